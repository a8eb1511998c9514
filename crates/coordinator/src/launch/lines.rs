//! What a rank writes, cut into lines that say whose they are.

/// The longest piece of a line that is kept back until its end is seen.
const LINE_BYTES_MAX: usize = 16 << 10;

/// Cuts one stream into lines.
#[derive(Debug)]
pub(super) struct Lines {
    prefix: Vec<u8>,
    /// A line whose end has not been seen.
    open: Vec<u8>,
    /// Whether `open` continues a line of which pieces are gone.
    continued: bool,
    /// Lines that begin with this are handed out apart.
    held: Option<&'static [u8]>,
}

/// What became of the bytes that were fed.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Cut {
    /// Whole lines with their prefix, ready to be written.
    pub(super) forward: Vec<u8>,
    /// The first line that is held back, without its beginning and its end.
    pub(super) held: Option<Vec<u8>>,
}

impl Lines {
    /// Lines that are forwarded after `prefix`, those that begin with `held` apart.
    pub(super) fn new(prefix: String, held: Option<&'static [u8]>) -> Self {
        Self { prefix: prefix.into_bytes(), open: Vec::new(), continued: false, held }
    }

    /// The lines that end within `bytes`, and pieces of one that is longer than anyone reads.
    pub(super) fn feed(&mut self, bytes: &[u8]) -> Cut {
        let mut cut = Cut::default();
        for part in bytes.split_inclusive(|byte| *byte == b'\n') {
            match part.strip_suffix(b"\n") {
                Some(end) => {
                    self.append(end, &mut cut);
                    self.close(&mut cut);
                    self.continued = false;
                }
                None => self.append(part, &mut cut),
            }
        }
        cut
    }

    /// What was written last, if it has no end.
    pub(super) fn finish(&mut self) -> Cut {
        let mut cut = Cut::default();
        if !self.open.is_empty() {
            self.close(&mut cut);
        }
        cut
    }

    fn append(&mut self, mut bytes: &[u8], cut: &mut Cut) {
        while self.open.len() + bytes.len() > LINE_BYTES_MAX {
            let (piece, rest) = bytes.split_at(LINE_BYTES_MAX - self.open.len());
            self.open.extend_from_slice(piece);
            self.close(cut);
            self.continued = true;
            bytes = rest;
        }
        self.open.extend_from_slice(bytes);
    }

    fn close(&mut self, cut: &mut Cut) {
        let held = self.held.filter(|_| !self.continued);
        match held.and_then(|start| self.open.strip_prefix(start)) {
            Some(line) => {
                cut.held.get_or_insert_with(|| line.to_vec());
            }
            None => {
                // a rank of ours may have said itself whose line it is
                if self.continued || !self.open.starts_with(&self.prefix) {
                    cut.forward.extend_from_slice(&self.prefix);
                }
                cut.forward.extend_from_slice(&self.open);
                cut.forward.push(b'\n');
            }
        }
        self.open.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines(held: Option<&'static [u8]>) -> Lines {
        Lines::new("[rank 3] ".to_owned(), held)
    }

    #[test]
    fn lines_are_whole_however_they_arrive_and_keep_their_bytes() {
        let text = b"one\n\ntw\xff\r\nlast";
        for step in 1..text.len() {
            let mut lines = lines(None);
            let mut forward = Vec::new();
            for bytes in text.chunks(step) {
                forward.extend(lines.feed(bytes).forward);
            }
            forward.extend(lines.finish().forward);
            let wanted = b"[rank 3] one\n[rank 3] \n[rank 3] tw\xff\r\n[rank 3] last\n";
            assert_eq!(forward, wanted, "{step} bytes at a time");
        }
    }

    #[test]
    fn whose_a_line_is_is_said_once() {
        let mut lines = lines(None);
        let forward = lines.feed(b"[rank 3] WARN a\n[rank 31] b\n").forward;
        assert_eq!(forward, b"[rank 3] WARN a\n[rank 3] [rank 31] b\n");
    }

    #[test]
    fn a_line_without_an_end_comes_in_pieces() {
        let mut lines = lines(None);
        let long = vec![b'x'; 2 * LINE_BYTES_MAX + 1];
        let cut = lines.feed(&long).forward;
        assert_eq!(cut.iter().filter(|byte| **byte == b'\n').count(), 2);
        let cut = [cut, lines.feed(b"y\n").forward].concat();
        let parts: Vec<&[u8]> = cut.split(|byte| *byte == b'\n').collect();
        assert_eq!(parts[2], b"[rank 3] xy");
        assert_eq!(parts[0].len(), LINE_BYTES_MAX + "[rank 3] ".len());
        // one that is exactly as long is one piece
        let exact = [vec![b'x'; LINE_BYTES_MAX], b"\n".to_vec()].concat();
        assert_eq!(lines.feed(&exact).forward.len(), exact.len() + "[rank 3] ".len());
    }

    #[test]
    fn final_lines_are_held_back_the_first_of_them_kept() {
        let mut held = lines(Some(b"longshore: "));
        let cut = held.feed(b"say longshore: a\nlongshore: b\nlongshore: c\nlongshor");
        assert_eq!(cut.forward, b"[rank 3] say longshore: a\n");
        assert_eq!(cut.held.as_deref(), Some(&b"b"[..]));
        assert_eq!(held.feed(b"e: d"), Cut::default());
        assert_eq!(held.finish().held.as_deref(), Some(&b"d"[..]));
        assert_eq!(lines(None).feed(b"longshore: b\n").held, None);
    }
}
