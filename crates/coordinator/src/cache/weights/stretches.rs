//! Which stretches of a weight file are kept, and what of a range is to be fetched. Pure: names and ranges in, ranges out.
//!
//! ```text
//! kept       ├── stretch ──┤   ├─ stretch ─┤
//! wanted          ├───────────────────┤
//! parts           │  kept  │ m │ kept   │      a stretch is checked as a whole, whatever part of it is wanted
//! ```

use std::collections::BTreeMap;

use longshore_models::byte_range::ByteRange;

/// The longest stretch: whoever wants a part of one reads all of it to check it.
pub(super) const STRETCH_BYTES: u64 = 8 << 20;

/// The checksum that follows the bytes of a stretch.
pub(super) const CHECKSUM_BYTES: u64 = 16;

/// What is kept between two missing parts is fetched with them where it is not longer than this: a request costs more.
const GAP_BYTES: u64 = 64 << 10;

/// The blocks in which file systems hand out space.
const BLOCK_BYTES: u64 = 4096;

/// What a stretch takes of the file system.
pub(super) fn stored_bytes(stretch: ByteRange) -> u64 {
    (stretch.len() + CHECKSUM_BYTES).next_multiple_of(BLOCK_BYTES)
}

/// The name of the file that holds a stretch: both ends in 16 hexadecimal digits.
pub(super) fn file_name(stretch: ByteRange) -> String {
    format!("{:016x}-{:016x}", stretch.start, stretch.end)
}

/// The stretch that a file of this name holds.
pub(super) fn parse_file_name(name: &str) -> Option<ByteRange> {
    let (start, end) = name.split_once('-')?;
    let number = |text: &str| u64::from_str_radix(text, 16).ok();
    let (start, end) = (number(start)?, number(end)?);
    let fits = start < end && end - start <= STRETCH_BYTES;
    let stretch = fits.then(|| ByteRange::new(start, end))?;
    // of the spellings of a number, one is right
    (file_name(stretch) == name).then_some(stretch)
}

/// `range` in pieces that may be stretches.
pub(super) fn cut(range: ByteRange) -> impl Iterator<Item = ByteRange> {
    let starts = (range.start..range.end).step_by(STRETCH_BYTES as usize);
    starts
        .map(move |start| ByteRange::new(start, range.end.min(start.saturating_add(STRETCH_BYTES))))
}

/// The stretches of a weight file that are kept. They may overlap.
#[derive(Debug, Default)]
pub(super) struct Stretches {
    /// The end of the longest of each start.
    ends: BTreeMap<u64, u64>,
}

/// A part of a range.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Part {
    /// It lies within a stretch.
    Kept {
        part: ByteRange,
        stretch: ByteRange,
    },
    Missing(ByteRange),
}

impl Stretches {
    pub(super) fn add(&mut self, stretch: ByteRange) {
        let end = self.ends.entry(stretch.start).or_default();
        *end = stretch.end.max(*end);
    }

    pub(super) fn remove(&mut self, stretch: ByteRange) {
        if self.ends.get(&stretch.start) == Some(&stretch.end) {
            self.ends.remove(&stretch.start);
        }
    }

    /// Whether all of `range` is kept.
    pub(super) fn cover(&self, range: ByteRange) -> bool {
        !self.parts(range).iter().any(|part| matches!(part, Part::Missing(_)))
    }

    /// Parts in order that together are `range`.
    pub(super) fn parts(&self, range: ByteRange) -> Vec<Part> {
        // a scalar that was read alone is not looked for in what is much longer
        if self.ends.get(&range.start) == Some(&range.end) {
            return vec![Part::Kept { part: range, stretch: range }];
        }
        let mut parts = Vec::new();
        let mut at = range.start;
        while at < range.end {
            let stretch = self.furthest_over(at);
            let end = stretch.map_or_else(|| self.next_start(at), |s| s.end).min(range.end);
            let part = ByteRange::new(at, end);
            parts.push(stretch.map_or(Part::Missing(part), |stretch| Part::Kept { part, stretch }));
            at = end;
        }
        parts
    }

    /// Of the stretches that hold the byte, the one that reaches furthest, so that few are read.
    fn furthest_over(&self, at: u64) -> Option<ByteRange> {
        let first = (at + 1).saturating_sub(STRETCH_BYTES);
        let over = self.ends.range(first..=at).filter(|(_, end)| **end > at);
        over.max_by_key(|(_, end)| **end).map(|(start, end)| ByteRange::new(*start, *end))
    }

    fn next_start(&self, at: u64) -> u64 {
        self.ends.range(at..).next().map_or(u64::MAX, |(start, _)| *start)
    }
}

/// What is to be fetched where `missing` is missing, in order: neighbours in one.
pub(super) fn to_fetch(missing: &[ByteRange]) -> Vec<ByteRange> {
    let mut fetches: Vec<ByteRange> = Vec::new();
    for range in missing {
        match fetches.last_mut() {
            Some(last) if range.start - last.end <= GAP_BYTES => last.end = range.end,
            _ => fetches.push(*range),
        }
    }
    fetches
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn range(start: u64, end: u64) -> ByteRange {
        ByteRange::new(start, end)
    }

    #[test]
    fn names_tell_stretches_and_nothing_else() {
        for stretch in [range(0, 1), range(7, 7 + STRETCH_BYTES), range(u64::MAX - 1, u64::MAX)] {
            assert_eq!(parse_file_name(&file_name(stretch)), Some(stretch));
        }
        let name = file_name(range(10, 300));
        assert_eq!(name, "000000000000000a-000000000000012c");
        for none in [
            "used",
            "",
            "-",
            &name[1..],
            &name.to_uppercase(),
            &format!("{name}.1-1.unfinished"),
            &format!("+{}", &name[1..]),
            "000000000000000a-000000000000000a",
            "000000000000000b-000000000000000a",
            "0000000000000000-0000000000800001",
        ] {
            assert_eq!(parse_file_name(none), None, "{none}");
        }
    }

    #[test]
    fn long_ranges_are_cut() {
        let pieces: Vec<ByteRange> = cut(range(5, 2 * STRETCH_BYTES + 6)).collect();
        let second = 5 + STRETCH_BYTES;
        let third = second + STRETCH_BYTES;
        assert_eq!(pieces, [range(5, second), range(second, third), range(third, third + 1)]);
        assert_eq!(cut(range(5, 5)).count(), 0);
        assert_eq!(cut(range(u64::MAX - 1, u64::MAX)).count(), 1);
    }

    #[test]
    fn short_gaps_are_fetched_with_their_neighbours() {
        let far = 10 + GAP_BYTES;
        let missing =
            [range(0, 5), range(5, 10), range(far, far + 1), range(2 * far + 2, 2 * far + 3)];
        assert_eq!(to_fetch(&missing), [range(0, far + 1), range(2 * far + 2, 2 * far + 3)]);
        assert_eq!(to_fetch(&[]), []);
    }

    /// Bytes of the property's object; its stretches are as long as any may be, measured in these.
    const UNIT: u64 = STRETCH_BYTES / 16;

    fn ranges() -> impl Strategy<Value = ByteRange> {
        (0_u64..64, 1_u64..=16).prop_map(|(at, len)| range(at * UNIT, (at + len) * UNIT))
    }

    proptest! {
        /// Against units that are marked one by one.
        #[test]
        fn parts_are_what_was_added(
            added in proptest::collection::vec(ranges(), 0..8),
            wanted in ranges(),
        ) {
            let mut stretches = Stretches::default();
            added.iter().for_each(|stretch| stretches.add(*stretch));
            let mut at = wanted.start;
            let parts = stretches.parts(wanted);
            for found in &parts {
                let (Part::Kept { part, .. } | Part::Missing(part)) = found;
                prop_assert!(part.start == at && part.end > at);
                at = part.end;
                for unit in (part.start..part.end).step_by(UNIT as usize) {
                    let kept = added.iter().any(|s| s.start <= unit && unit < s.end);
                    prop_assert_eq!(kept, matches!(found, Part::Kept { .. }));
                }
                if let Part::Kept { part, stretch } = found {
                    prop_assert!(stretch.start <= part.start && part.end <= stretch.end);
                    prop_assert!(added.contains(stretch));
                }
            }
            prop_assert_eq!(at, wanted.end);
            let all = parts.iter().all(|part| matches!(part, Part::Kept { .. }));
            prop_assert_eq!(stretches.cover(wanted), all);
        }
    }
}
