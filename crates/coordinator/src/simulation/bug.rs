//! Bugs that can be planted, to see that the invariants catch them.

/// One bug.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Bug {
    /// A rank does not note some of what has landed.
    ForgetsRange,
    /// A rank says that it has what it is about to read.
    HaveTooLarge,
    /// A rank tells what it has while workers of the generation before are still at it.
    DoesNotWaitForWorkers,
    /// Bytes are sent to, and taken by, ranks that have them.
    IgnoresSettled,
    /// What a rank is to hand on out of its parameters it reads from storage again.
    ReadsWhatItHas,
    /// A finish that was run is run again in the next generation.
    FinishesAgain,
    /// A rank says that it is ready when its reads are done.
    ReadyTooSoon,
    /// A read takes a slot that is not free.
    TakesSlotInUse,
    /// The coordinator takes what is said of an older generation for what is said of this one.
    HearsOldGeneration,
    /// A rank takes news of its older workers for news of the present ones.
    HearsOldWorkers,
    /// All are released when all but one are ready.
    ReleasesTooSoon,
    /// A process is let in as a rank that is there.
    SeatsTwo,
    /// Nobody tells a replacement what to do.
    ForgetsReplacement,
    /// One of the ranks that are left numbers them in another order.
    NumbersOtherwise,
    /// What a rank had in a former group is looked for under its present number.
    TakesPresentNumber,
    /// A rank hands over what has not landed.
    HandsOverTooMuch,
    /// A rank hands over less than has landed.
    HandsOverTooLittle,
    /// A rank hands over while its workers are still at it.
    HandsOverTooSoon,
    /// Ranks that have not joined yet are left behind.
    LeavesWhoeverIsOnItsWay,
    /// A rank that is left behind goes on in the group of the others.
    GoesOnLeftBehind,
}
