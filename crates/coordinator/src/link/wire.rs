//! Values as bytes: the protocol's version, then postcard.

use bytes::Bytes;
use serde::{Serialize, de::DeserializeOwned};

/// The version of everything that is said on a link; two processes that differ in it do not talk.
pub const PROTOCOL_VERSION: u8 = 4;

/// Why bytes are no value, or a value no bytes.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum WireError {
    /// There is not even a version.
    #[error("the message is empty")]
    Empty,
    /// The other side speaks another version.
    #[error("the message is of protocol version {found}, this is version {PROTOCOL_VERSION}")]
    Version {
        /// The version of the message.
        found: u8,
    },
    /// The bytes are not what the type needs.
    #[error("the message of {bytes} bytes is malformed")]
    Malformed {
        /// Bytes of the message.
        bytes: usize,
        /// What was met.
        #[source]
        source: postcard::Error,
    },
    /// A value is there, and more behind it.
    #[error("{trailing} of the message's {bytes} bytes follow its end")]
    Trailing {
        /// Bytes that belong to nothing.
        trailing: usize,
        /// Bytes of the message.
        bytes: usize,
    },
    /// The value has no form in bytes.
    #[error("the message cannot be encoded")]
    Encode {
        /// Why.
        #[source]
        source: postcard::Error,
    },
}

/// Encodes `value`.
///
/// # Errors
/// Its type holds what postcard has no form for: a sequence of unknown length, for one.
pub fn encode<T: Serialize>(value: &T) -> Result<Bytes, WireError> {
    postcard::to_extend(value, vec![PROTOCOL_VERSION])
        .map(Bytes::from)
        .map_err(|source| WireError::Encode { source })
}

/// Decodes what [`encode`] made, the whole of `bytes`.
///
/// Memory stays in proportion to `bytes` whatever lengths they claim: serde reserves for at most a mebibyte on trust. A type
/// with a sequence of elements that take no bytes would break this; no message has one.
///
/// # Errors
/// Another version, malformed bytes, bytes left over.
pub fn decode<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, WireError> {
    let (&version, body) = bytes.split_first().ok_or(WireError::Empty)?;
    if version != PROTOCOL_VERSION {
        return Err(WireError::Version { found: version });
    }
    let (value, rest) = postcard::take_from_bytes(body)
        .map_err(|source| WireError::Malformed { bytes: bytes.len(), source })?;
    match rest.len() {
        0 => Ok(value),
        trailing => Err(WireError::Trailing { trailing, bytes: bytes.len() }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    type Value = (u32, String, Vec<u64>);

    fn value() -> Value {
        (7, "seven".to_owned(), vec![1, u64::MAX])
    }

    #[test]
    fn a_value_comes_back() {
        assert_eq!(decode::<Value>(&encode(&value()).unwrap()).unwrap(), value());
    }

    /// One test per way a message can be wrong.
    #[test]
    fn what_is_wrong_with_a_message_is_told_apart() {
        let good = encode(&value()).unwrap();
        assert!(matches!(decode::<Value>(&[]), Err(WireError::Empty)));

        let mut other = good.to_vec();
        other[0] = PROTOCOL_VERSION + 1;
        let found = decode::<Value>(&other).unwrap_err();
        assert_eq!(found.to_string(), "the message is of protocol version 5, this is version 4");

        for cut in 1..good.len() {
            let found = decode::<Value>(&good[..cut]);
            assert!(matches!(found, Err(WireError::Malformed { bytes, .. }) if bytes == cut));
        }

        let longer = [&good[..], b"abc"].concat();
        let found = decode::<Value>(&longer);
        assert!(
            matches!(found, Err(WireError::Trailing { trailing: 3, bytes }) if bytes == longer.len())
        );
    }

    #[test]
    fn a_length_that_lies_is_malformed() {
        // a string of 2^35 bytes, of which there are none
        let bytes = [PROTOCOL_VERSION, 0x80, 0x80, 0x80, 0x80, 0x80, 0x01];
        assert!(matches!(decode::<String>(&bytes), Err(WireError::Malformed { .. })));
        assert!(matches!(decode::<Vec<u64>>(&bytes), Err(WireError::Malformed { .. })));
    }

    proptest::proptest! {
        #[test]
        fn no_bytes_panic(bytes: Vec<u8>) {
            let _ = decode::<Value>(&bytes);
        }
    }
}
