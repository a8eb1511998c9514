//! The secret that the processes of one load share.
//!
//! Whoever starts them makes it and hands it down by [`SECRET_VARIABLE`]. It is never sent: each side of a connection
//! proves that it knows it by a code over the other side's challenge.

use std::{fmt, io};

use hmac::{Hmac, Mac};
use sha2::Sha256;

/// The environment variable that carries the secret.
pub const SECRET_VARIABLE: &str = "LONGSHORE_SECRET";

/// Bytes of a challenge.
pub const CHALLENGE_BYTES: usize = 32;

/// Bytes of the proof that answers one.
pub const PROOF_BYTES: usize = 32;

/// A shared secret; never printed.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(Vec<u8>);

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(…)")
    }
}

impl Secret {
    /// A fresh one, from the system's source of randomness, as text to be handed down.
    ///
    /// # Errors
    /// The system gives no randomness.
    pub fn random_text() -> io::Result<String> {
        Ok(random()?.iter().map(|b| format!("{b:02x}")).collect())
    }

    /// The secret that `text` stands for; any text will do, its bytes count.
    pub fn from_text(text: &str) -> Self {
        Self(text.trim().as_bytes().to_vec())
    }

    /// The proof that whoever computed it knows the secret, over all `parts` in order.
    pub fn prove(&self, parts: &[&[u8]]) -> [u8; PROOF_BYTES] {
        self.code(parts).finalize().into_bytes().into()
    }

    /// Whether `proof` is the proof over `parts`; takes the same time wherever it differs.
    pub fn verify(&self, parts: &[&[u8]], proof: &[u8]) -> bool {
        self.code(parts).verify_slice(proof).is_ok()
    }

    fn code(&self, parts: &[&[u8]]) -> Hmac<Sha256> {
        // HMAC takes keys of any length
        let mut code = <Hmac<Sha256> as Mac>::new_from_slice(&self.0).expect("any length is a key");
        for part in parts {
            // lengths keep ("ab", "c") apart from ("a", "bc")
            code.update(&(part.len() as u64).to_le_bytes());
            code.update(part);
        }
        code
    }
}

/// A challenge that nobody can foresee.
///
/// # Errors
/// The system gives no randomness.
pub fn random() -> io::Result<[u8; CHALLENGE_BYTES]> {
    let mut bytes = [0; CHALLENGE_BYTES];
    getrandom::fill(&mut bytes).map_err(io::Error::other)?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_proof_holds_for_its_secret_and_parts_only() {
        let secret = Secret::from_text("abc");
        let proof = secret.prove(&[b"ab", b"c"]);
        assert!(secret.verify(&[b"ab", b"c"], &proof));
        assert!(!secret.verify(&[b"a", b"bc"], &proof));
        assert!(!secret.verify(&[b"ab", b"c"], &proof[..31]));
        assert!(!Secret::from_text("abd").verify(&[b"ab", b"c"], &proof));
    }

    #[test]
    fn a_secret_is_not_printed() {
        assert_eq!(format!("{:?}", Secret::from_text("abc")), "Secret(…)");
        assert_ne!(Secret::random_text().unwrap(), Secret::random_text().unwrap());
    }
}
