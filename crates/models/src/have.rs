//! What a rank has of a checkpoint: byte ranges of its files. What it needs is its placement without them.

use serde::{Deserialize, Serialize};

use crate::{byte_range::ByteRange, declare::ParamId};

/// Bytes of one file, as ranges that neither overlap nor touch, in order.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct RangeSet(Vec<ByteRange>);

impl RangeSet {
    /// Adds a range; what of it is there already stays.
    pub fn insert(&mut self, range: ByteRange) {
        if range.is_empty() {
            return;
        }
        // those that overlap or touch
        let first = self.0.partition_point(|r| r.end < range.start);
        let past = self.0.partition_point(|r| r.start <= range.end);
        let start = self.0.get(first).map_or(range.start, |r| r.start.min(range.start));
        let end = match past.checked_sub(1) {
            Some(last) if last >= first => self.0[last].end.max(range.end),
            _ => range.end,
        };
        let start = if first < past { start } else { range.start };
        self.0.splice(first..past, [ByteRange::new(start, end)]);
    }

    /// The ranges, in order.
    pub fn ranges(&self) -> &[ByteRange] {
        &self.0
    }

    /// How many bytes they are.
    pub fn bytes(&self) -> u64 {
        self.0.iter().map(ByteRange::len).sum()
    }

    /// Whether every byte of `range` is there.
    pub fn covers(&self, range: ByteRange) -> bool {
        range.is_empty() || self.cut(range).all(|(_, there)| there)
    }

    /// `range` in order, cut where it changes whether bytes are there.
    pub fn cut(&self, range: ByteRange) -> impl Iterator<Item = (ByteRange, bool)> {
        let mut next = self.0.partition_point(|r| r.end <= range.start);
        let mut at = range.start;
        std::iter::from_fn(move || {
            if at >= range.end {
                return None;
            }
            let (end, there) = match self.0.get(next) {
                Some(r) if r.start <= at => (r.end.min(range.end), true),
                Some(r) => (r.start.min(range.end), false),
                None => (range.end, false),
            };
            if there {
                next += 1;
            }
            let part = ByteRange::new(at, end);
            at = end;
            Some((part, there))
        })
    }
}

/// What one rank has of each file of a checkpoint: whatever of these bytes it needs has landed in its parameters.
///
/// Bytes that it does not need may be among them or not.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Have(Vec<RangeSet>);

impl Have {
    /// Adds a range of a file.
    pub fn insert(&mut self, file: u32, range: ByteRange) {
        let file = file as usize;
        if self.0.len() <= file {
            self.0.resize_with(file + 1, RangeSet::default);
        }
        self.0[file].insert(range);
    }

    /// What there is of a file.
    pub fn file(&self, file: u32) -> &RangeSet {
        static NOTHING: RangeSet = RangeSet(Vec::new());
        self.0.get(file as usize).unwrap_or(&NOTHING)
    }

    /// Of each file what there is, as far as there is anything.
    pub fn files(&self) -> impl Iterator<Item = (u32, &RangeSet)> {
        self.0.iter().enumerate().map(|(file, ranges)| (file as u32, ranges))
    }

    /// Whether there is nothing.
    pub fn is_empty(&self) -> bool {
        self.0.iter().all(|file| file.0.is_empty())
    }
}

/// As it goes over the wire: of each file the ranges, start and end.
impl Serialize for Have {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let pairs = |file: &RangeSet| file.0.iter().map(|r| (r.start, r.end)).collect();
        self.0.iter().map(pairs).collect::<Vec<Vec<(u64, u64)>>>().serialize(serializer)
    }
}

/// Ranges from elsewhere may be any numbers: those that run backwards are refused, all others are put in order.
impl<'de> Deserialize<'de> for Have {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let files = Vec::<Vec<(u64, u64)>>::deserialize(deserializer)?;
        let mut have = Self(vec![RangeSet::default(); files.len()]);
        for (set, ranges) in have.0.iter_mut().zip(files) {
            for (start, end) in ranges {
                if end < start {
                    return Err(serde::de::Error::custom(format!("range {start}..{end}")));
                }
                set.insert(ByteRange::new(start, end));
            }
        }
        Ok(have)
    }
}

/// What stays of the parameters that are to be loaded into again: nobody writes it, and nothing of it is read.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Kept {
    /// For each parameter whether it is complete and finished as it is; those that are not listed are not.
    pub params: Vec<bool>,
    /// Where their bytes are in the checkpoint that is to be loaded. No byte of it lands in a parameter that does not stay.
    pub have: Have,
    /// How many bytes of the checkpoint that is.
    pub bytes: u64,
}

impl Kept {
    /// Whether a parameter stays.
    pub fn has(&self, param: ParamId) -> bool {
        self.params.get(param as usize).copied().unwrap_or(false)
    }

    /// Whether none stays.
    pub fn is_empty(&self) -> bool {
        !self.params.contains(&true)
    }
}

/// A set of ranks.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash)]
pub struct RankSet(Vec<u64>);

impl RankSet {
    /// Adds a rank.
    pub fn insert(&mut self, rank: u32) {
        let word = rank as usize / 64;
        if self.0.len() <= word {
            self.0.resize(word + 1, 0);
        }
        self.0[word] |= 1 << (rank % 64);
    }

    /// Whether a rank is in it.
    pub fn contains(&self, rank: u32) -> bool {
        self.0.get(rank as usize / 64).is_some_and(|word| word >> (rank % 64) & 1 == 1)
    }

    /// Whether no rank is in it.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The ranks, in order.
    pub fn iter(&self) -> impl Iterator<Item = u32> {
        let bits = |(i, word): (usize, &u64)| {
            let (first, word) = (64 * i as u32, *word);
            (0..64).filter(move |bit| word >> bit & 1 == 1).map(move |bit| first + bit)
        };
        self.0.iter().enumerate().flat_map(bits)
    }

    /// The only rank, when there is just one.
    pub fn sole(&self) -> Option<u32> {
        let mut ranks = self.iter();
        ranks.next().filter(|_| ranks.next().is_none())
    }
}

impl FromIterator<u32> for RankSet {
    fn from_iter<T: IntoIterator<Item = u32>>(ranks: T) -> Self {
        let mut set = Self::default();
        ranks.into_iter().for_each(|rank| set.insert(rank));
        set
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// Against every byte listed.
        #[test]
        fn ranges_are_a_set_of_bytes(
            ranges in proptest::collection::vec((0u64..40, 0u64..8), 0..12),
            asked in (0u64..40, 0u64..20),
        ) {
            let (mut set, mut bytes) = (RangeSet::default(), [false; 64]);
            for (start, len) in ranges {
                set.insert(ByteRange::new(start, start + len));
                bytes[start as usize..(start + len) as usize].fill(true);
            }
            prop_assert!(set.0.windows(2).all(|w| w[0].end < w[1].start), "{:?}", set);
            prop_assert_eq!(set.bytes(), bytes.iter().filter(|b| **b).count() as u64);
            let asked = ByteRange::new(asked.0, asked.0 + asked.1);
            let listed = &bytes[asked.start as usize..asked.end as usize];
            prop_assert_eq!(set.covers(asked), listed.iter().all(|b| *b));
            let mut at = asked.start;
            for (part, there) in set.cut(asked) {
                prop_assert!(part.start == at && !part.is_empty());
                at = part.end;
                prop_assert!(bytes[part.start as usize..part.end as usize].iter().all(|b| *b == there));
            }
            prop_assert_eq!(at, asked.end);
        }
    }

    #[test]
    fn ranks_are_in_the_set_or_not() {
        let set: RankSet = [0, 63, 64, 200].into_iter().collect();
        let there: Vec<u32> = (0..300).filter(|r| set.contains(*r)).collect();
        assert_eq!(there, [0, 63, 64, 200]);
        assert_eq!(set.iter().collect::<Vec<u32>>(), there);
        assert_eq!(set.sole(), None);
        assert!(!set.is_empty() && RankSet::default().is_empty());
        assert_eq!(RankSet::from_iter([70, 70]).sole(), Some(70));
        assert_eq!(RankSet::default().sole(), None);
    }
}
