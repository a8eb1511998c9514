//! How many requests may be in flight: decided in [`control`] without clock or lock, kept to by [`gate`].

pub(crate) mod control;
pub(crate) mod gate;
