//! Half-open byte ranges of a checkpoint file.

use std::fmt;

/// A half-open range of bytes, `start..end`, with `start <= end`.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ByteRange {
    /// First byte.
    pub start: u64,
    /// One past the last byte.
    pub end: u64,
}

impl ByteRange {
    /// Makes the range `start..end`.
    ///
    /// # Panics
    /// When `end < start`: ranges read from the outside world are checked before they get here.
    pub fn new(start: u64, end: u64) -> Self {
        assert!(start <= end, "byte range {start}..{end} runs backwards");
        Self { start, end }
    }

    /// Length in bytes.
    pub fn len(&self) -> u64 {
        self.end - self.start
    }

    /// Whether the range holds no byte.
    pub fn is_empty(&self) -> bool {
        self.start == self.end
    }

    /// The bytes that both ranges hold; `None` when they share none.
    pub fn intersect(&self, other: &ByteRange) -> Option<ByteRange> {
        let (start, end) = (self.start.max(other.start), self.end.min(other.end));
        (start < end).then_some(ByteRange { start, end })
    }
}

impl fmt::Display for ByteRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}..{}", self.start, self.end)
    }
}

impl fmt::Debug for ByteRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn intersection_is_what_both_hold() {
        let a = ByteRange::new(10, 20);
        assert_eq!(a.intersect(&ByteRange::new(15, 30)), Some(ByteRange::new(15, 20)));
        assert_eq!(a.intersect(&ByteRange::new(20, 30)), None);
        assert_eq!(a.intersect(&ByteRange::new(0, 100)), Some(a));
    }
}
