//! A stream of bytes as frames: length as `u32`, little endian like everything in a checkpoint, then so many bytes.
//!
//! The codec is our own because tokio-util's neither names length and limit when a frame is too long, nor refrains from
//! reserving what a mere announcement asks for. Here memory grows only with bytes that did arrive.

use std::io;

use bytes::{Buf, BufMut, Bytes, BytesMut};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio_util::codec::{Decoder, Encoder};

/// The longest frame that someone who has not proven anything may send: a join has about 200 bytes.
pub const STRANGER_FRAME_MAX: usize = 1 << 10;

/// The longest frame of a session: room for a plan; weights do not travel in frames.
pub const FRAME_MAX: usize = 16 << 20;

/// Bytes of the length in front of a frame.
const HEAD: usize = 4;

/// Why there is no frame.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FrameError {
    /// A frame is longer than allowed; nothing of it was read or sent.
    #[error("a frame of {length} bytes, {limit} are allowed")]
    Oversize {
        /// Its length.
        length: usize,
        /// The longest allowed.
        limit: usize,
    },
    /// The stream ended within a frame.
    #[error("the stream ended {have} bytes into a frame")]
    Cut {
        /// Bytes of it that had come, its length among them.
        have: usize,
    },
    /// The stream failed.
    #[error(transparent)]
    Io(#[from] io::Error),
}

/// Cuts a stream into frames and joins frames to a stream.
#[derive(Debug, Clone, Copy)]
pub struct FrameCodec {
    limit: usize,
}

impl FrameCodec {
    /// A codec for frames of at most `limit` bytes.
    pub fn new(limit: usize) -> Self {
        Self { limit }
    }
}

impl Decoder for FrameCodec {
    type Item = Bytes;
    type Error = FrameError;

    fn decode(&mut self, received: &mut BytesMut) -> Result<Option<Bytes>, FrameError> {
        let Some(head) = received.first_chunk::<HEAD>() else { return Ok(None) };
        let length = length(*head, self.limit)?;
        if received.len() - HEAD < length {
            return Ok(None);
        }
        received.advance(HEAD);
        Ok(Some(received.split_to(length).freeze()))
    }

    fn decode_eof(&mut self, received: &mut BytesMut) -> Result<Option<Bytes>, FrameError> {
        match self.decode(received)? {
            None if !received.is_empty() => Err(FrameError::Cut { have: received.len() }),
            frame => Ok(frame),
        }
    }
}

impl Encoder<Bytes> for FrameCodec {
    type Error = FrameError;

    fn encode(&mut self, frame: Bytes, stream: &mut BytesMut) -> Result<(), FrameError> {
        let head = head(&frame, self.limit)?;
        stream.reserve(HEAD + frame.len());
        stream.put_slice(&head);
        stream.put_slice(&frame);
        Ok(())
    }
}

/// Reads one frame and not a byte more, so that whoever has the stream next misses none.
///
/// # Errors
/// A frame longer than `limit`, the stream's end, a failed read.
pub async fn read_frame<S: AsyncRead + Unpin>(
    stream: &mut S,
    limit: usize,
) -> Result<Vec<u8>, FrameError> {
    let mut head = [0; HEAD];
    stream.read_exact(&mut head).await?;
    let mut frame = vec![0; length(head, limit)?];
    stream.read_exact(&mut frame).await?;
    Ok(frame)
}

/// Writes one frame, all of it.
///
/// # Errors
/// A frame longer than `limit`, a failed write.
pub async fn write_frame<S: AsyncWrite + Unpin>(
    stream: &mut S,
    frame: &[u8],
    limit: usize,
) -> Result<(), FrameError> {
    let whole = [&head(frame, limit)?, frame].concat();
    stream.write_all(&whole).await?;
    Ok(stream.flush().await?)
}

fn length(head: [u8; HEAD], limit: usize) -> Result<usize, FrameError> {
    let length = u32::from_le_bytes(head) as usize;
    if length > limit {
        return Err(FrameError::Oversize { length, limit });
    }
    Ok(length)
}

fn head(frame: &[u8], limit: usize) -> Result<[u8; HEAD], FrameError> {
    let length = frame.len();
    match u32::try_from(length) {
        Ok(word) if length <= limit => Ok(word.to_le_bytes()),
        _ => Err(FrameError::Oversize { length, limit }),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn decode_all(codec: &mut FrameCodec, pieces: &[&[u8]]) -> Result<Vec<Bytes>, FrameError> {
        let (mut received, mut frames) = (BytesMut::new(), Vec::new());
        for piece in pieces {
            received.extend_from_slice(piece);
            while let Some(frame) = codec.decode(&mut received)? {
                frames.push(frame);
            }
        }
        while let Some(frame) = codec.decode_eof(&mut received)? {
            frames.push(frame);
        }
        Ok(frames)
    }

    #[test]
    fn a_frame_too_long_is_refused_by_its_length_alone() {
        let mut codec = FrameCodec::new(FRAME_MAX);
        let mut received = BytesMut::from(&((FRAME_MAX as u32 + 1).to_le_bytes())[..]);
        let found = codec.decode(&mut received).unwrap_err().to_string();
        assert_eq!(found, "a frame of 16777217 bytes, 16777216 are allowed");
        assert!(received.capacity() < 64, "nothing was reserved");

        let frame = Bytes::from(vec![0; STRANGER_FRAME_MAX + 1]);
        let sent = FrameCodec::new(STRANGER_FRAME_MAX).encode(frame, &mut BytesMut::new());
        assert!(matches!(sent, Err(FrameError::Oversize { length: 1025, limit: 1024 })));
    }

    #[test]
    fn an_announced_frame_reserves_nothing() {
        let mut received = BytesMut::from(&(FRAME_MAX as u32).to_le_bytes()[..]);
        assert!(FrameCodec::new(FRAME_MAX).decode(&mut received).unwrap().is_none());
        assert!(received.capacity() < 64);
    }

    #[test]
    fn an_end_within_a_frame_is_no_clean_end() {
        let found = decode_all(&mut FrameCodec::new(8), &[&[3, 0, 0, 0, 1, 2]]);
        assert!(matches!(found, Err(FrameError::Cut { have: 6 })));
        assert!(decode_all(&mut FrameCodec::new(8), &[]).unwrap().is_empty());
    }

    proptest! {
        /// Frames come back as they were, wherever the stream is cut.
        #[test]
        fn frames_survive_any_cut(
            frames in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..40), 0..8),
            cut in 0_usize..200,
        ) {
            let mut codec = FrameCodec::new(40);
            let mut stream = BytesMut::new();
            for frame in &frames {
                codec.encode(Bytes::from(frame.clone()), &mut stream).unwrap();
            }
            let (a, b) = stream.split_at(cut.min(stream.len()));
            prop_assert_eq!(decode_all(&mut codec, &[a, b]).unwrap(), frames);
        }

        #[test]
        fn no_bytes_panic_or_reserve(bytes: Vec<u8>) {
            let mut received = BytesMut::from(&bytes[..]);
            let before = received.capacity();
            while let Ok(Some(frame)) = FrameCodec::new(FRAME_MAX).decode_eof(&mut received) {
                prop_assert!(frame.len() <= bytes.len());
            }
            prop_assert!(received.capacity() <= before);
        }
    }
}
