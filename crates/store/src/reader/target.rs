//! Memory that a range is read into: one piece, or several that lie apart.

/// Where the bytes of one part go, piece after piece.
#[derive(Debug, Default)]
pub(crate) struct Target<'a> {
    pieces: Vec<Piece<'a>>,
    bytes: usize,
}

#[derive(Debug)]
struct Piece<'a> {
    /// Where in the target it ends.
    end: usize,
    memory: &'a mut [u8],
}

impl<'a> Target<'a> {
    pub(crate) fn len(&self) -> usize {
        self.bytes
    }

    pub(crate) fn push(&mut self, memory: &'a mut [u8]) {
        self.bytes += memory.len();
        self.pieces.push(Piece { end: self.bytes, memory });
    }

    /// Puts `bytes` at `at`.
    ///
    /// # Panics
    ///
    /// Where they would leave the target.
    pub(crate) fn write(&mut self, mut at: usize, mut bytes: &[u8]) {
        assert!(at + bytes.len() <= self.bytes, "bytes leave the target");
        let first = self.pieces.partition_point(|piece| piece.end <= at);
        for piece in &mut self.pieces[first..] {
            if bytes.is_empty() {
                return;
            }
            let begin = at + piece.memory.len() - piece.end;
            let (here, rest) = bytes.split_at(bytes.len().min(piece.end - at));
            piece.memory[begin..begin + here.len()].copy_from_slice(here);
            (at, bytes) = (at + here.len(), rest);
        }
    }
}

impl<'a> From<&'a mut [u8]> for Target<'a> {
    fn from(memory: &'a mut [u8]) -> Target<'a> {
        let mut target = Target::default();
        target.push(memory);
        target
    }
}

/// Deals `targets` out to parts of the given lengths, which together are as long.
pub(crate) fn deal<'a>(
    targets: &'a mut [&mut [u8]],
    lengths: impl Iterator<Item = usize>,
) -> Vec<Target<'a>> {
    let mut left = targets.iter_mut().map(|memory| &mut **memory);
    let mut open: &mut [u8] = &mut [];
    let mut dealt = Vec::new();
    for length in lengths {
        let mut target = Target::default();
        while target.len() < length {
            if open.is_empty() {
                let Some(next) = left.next() else { break };
                open = next;
                continue;
            }
            let most = open.len().min(length - target.len());
            let (piece, rest) = std::mem::take(&mut open).split_at_mut(most);
            target.push(piece);
            open = rest;
        }
        dealt.push(target);
    }
    dealt
}

#[cfg(test)]
mod tests {
    use super::*;

    /// STO-1 for targets in pieces: wherever pieces, parts and chunks begin, each byte comes to its place.
    #[test]
    fn bytes_come_to_their_places_whatever_the_cuts() {
        let source: Vec<u8> = (0..60).collect();
        for piece in 1..=60 {
            for part in [1, 7, 20, 59, 60] {
                for chunk in [1, 3, 19, 60] {
                    let mut memory = [0; 60];
                    let mut pieces: Vec<&mut [u8]> = Vec::new();
                    for run in memory.chunks_mut(piece) {
                        pieces.extend([run, &mut []]);
                    }
                    let parts = source.chunks(part);
                    let dealt = deal(&mut pieces, parts.clone().map(<[u8]>::len));
                    for (mut target, bytes) in dealt.into_iter().zip(parts) {
                        assert_eq!(target.len(), bytes.len());
                        for (n, chunk_bytes) in bytes.chunks(chunk).enumerate() {
                            target.write(n * chunk, chunk_bytes);
                        }
                    }
                    assert_eq!(memory[..], source, "{piece} {part} {chunk}");
                }
            }
        }
    }

    #[test]
    #[should_panic(expected = "bytes leave the target")]
    fn bytes_past_the_end_are_refused() {
        Target::from(&mut [0; 4][..]).write(3, &[1, 2]);
    }
}
