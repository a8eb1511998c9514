//! What can be asked of a place where objects lie: names, what is known of one, and a stream of a range of one. One attempt
//! each; repeating, waiting and counting bytes is the reader's.

mod exchange;
pub(crate) mod hub;
pub(crate) mod object;

use std::{fmt::Debug, ops::Range};

use bytes::Bytes;
use futures_util::{future::BoxFuture, stream::BoxStream};

use crate::{
    failure::Failure,
    object_info::{Identity, ObjectInfo},
};

/// The bytes of a response as they come.
pub(crate) type Body = BoxStream<'static, Result<Bytes, Failure>>;

/// One try of something.
pub(crate) type Attempt<'a, T> = BoxFuture<'a, Result<T, Failure>>;

/// A place where objects lie.
pub(crate) trait Source: Debug + Send + Sync {
    /// The objects right under the location, in order of their names.
    fn list(&self) -> Attempt<'_, Vec<ObjectInfo>>;

    /// What is known of one object.
    fn info<'a>(&'a self, name: &'a str) -> Attempt<'a, ObjectInfo>;

    /// What is known of an object that was looked at before, asked anew.
    fn check<'a>(&'a self, object: &'a ObjectInfo) -> Attempt<'a, ObjectInfo> {
        self.info(&object.name)
    }

    /// A whole object, unless it still is what `known` says
    /// ([`NotModified`](crate::failure::FailureKind::NotModified) then).
    fn fetch<'a>(
        &'a self,
        name: &'a str,
        known: Option<&'a Identity>,
    ) -> Attempt<'a, (ObjectInfo, Body)>;

    /// A range of an object that must still be the one that was looked at. The range is not empty and within the object.
    /// The body begins at its first byte; that it has all of them is not promised.
    fn open<'a>(&'a self, object: &'a ObjectInfo, range: Range<u64>) -> Attempt<'a, Body>;
}
