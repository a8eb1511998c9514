//! The server as clients meet it: `object_store` for what services do, requests by hand for what they do not.

#![allow(clippy::panic, clippy::unwrap_used, reason = "test code: a panic is the verdict")]
#![allow(missing_docs, unreachable_pub, reason = "test code")]

mod azure;
mod binary;
mod common;
mod faults;
mod gcs;
mod hub;
mod s3;
