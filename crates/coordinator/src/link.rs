//! The control link between the coordinator and ranks in processes of their own.
//!
//! ```text
//!  rank process                                        coordinator process
//!  connect ──── TCP, options ────────────────────────► listen
//!     │  ◄── greeting: magic, version, challenge ────────  │   handshake: who is this, does it know the secret?
//!     │  ─── join: rank, process, challenge, proof ─────►  │
//!     │  ◄── welcome: process, proof ────────────────────  │
//!  session ◄──── messages, heartbeats, goodbye ──────► session
//!  (on a thread of its own)                            (a task)
//! ```
//!
//! | module | in → out |
//! |---|---|
//! | [`wire`] | value ⇄ bytes, with a version |
//! | [`frame`] | bytes of a stream ⇄ frames, with a limit |
//! | [`handshake`] | a fresh stream → who is at its other end, proven |
//! | [`session`] | a proven stream → messages both ways until it ends, and why it did |
//! | [`thread`] | a session that goes on while everything else in the process is stuck |
//! | `cable` | a stream ⇄ the same, unless this process is cut off on purpose |
//! | [`tcp`], [`same_user`] | socket options; who owns the other end of a local connection |
//! | [`listen`], [`connect`](mod@connect) | addresses → proven connections, whatever else knocks or answers there |
//!
//! It neither encrypts nor moves weights: it keeps out whoever does not know the secret, and finds out that the other
//! side is dead (closed), hung (silent) or another one than expected (refused). It does not decide what follows from
//! that; the supervisor does.

pub(crate) mod cable;
pub mod connect;
pub mod frame;
pub mod handshake;
pub mod listen;
pub mod same_user;
pub mod session;
pub mod tcp;
pub mod thread;
pub mod wire;
