//! Finished parameters as a server sees them.

use longshore_rank::params::{ParamView, ReadyParams};

/// One finished parameter: its name, element type, rank-local shape and bytes, whose address stays the same as long as
/// the parameters live, also through a reload. What may be done with it, and how else it is handed over:
/// [`handover`](crate::handover).
pub type Param<'a> = ParamView<'a>;

/// One rank's parameters, all of them complete.
#[derive(Debug, Clone, Copy)]
pub struct Params<'a>(pub(super) &'a ReadyParams);

impl<'a> Params<'a> {
    /// The rank that holds them.
    pub fn rank(&self) -> u32 {
        self.0.rank
    }

    /// A parameter by its name, or by a second name that shares its storage.
    pub fn get(&self, name: &str) -> Option<Param<'a>> {
        self.0.get(name)
    }

    /// All of them under their own names, in model order.
    pub fn iter(&self) -> impl Iterator<Item = Param<'a>> {
        self.0.iter()
    }

    /// Second names: `(derived name, name of the parameter whose storage it shares)`.
    pub fn aliases(&self) -> impl Iterator<Item = (&'a str, &'a str)> {
        self.0.aliases()
    }
}
