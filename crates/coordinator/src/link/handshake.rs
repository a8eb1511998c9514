//! Who is at the other end of a fresh stream, proven both ways before anything else is said.
//!
//! ```text
//!  joiner                                                   admitter
//!    │ ◄── greeting: magic, version, its challenge ────────────  │  all that a stranger learns
//!    │ ─── join: claim, my challenge, proof over all of it ───►  │
//!    │ ◄── welcome: proof │ refused: why, proof │ (closed) ────  │  closed: the joiner's proof was wrong
//! ```
//!
//! A proof covers the protocol version, the role of whoever computes it, both challenges and everything claimed, so none
//! can be replayed on another connection, reflected to its maker, or used for another rank, attempt or purpose. Among what
//! each side claims is which process it is, so that the other can [fence](crate::fence) it once it counts as lost.
//! Frames are read to their last byte and no further: the stream can be handed on as it is.
//!
//! Nothing is encrypted, and who can alter packets on the way can take over a connection once it is proven.

use std::{
    collections::HashMap,
    future::Future,
    io,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use serde::{Deserialize, Serialize};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    time::timeout,
};

use crate::{
    fence::ProcessIdentity,
    link::{
        frame::{FrameError, STRANGER_FRAME_MAX, read_frame, write_frame},
        same_user::SameUserError,
        wire::{self, PROTOCOL_VERSION, WireError},
    },
    secret::{CHALLENGE_BYTES, PROOF_BYTES, Secret, random},
};

/// How long a handshake may take: two round trips, and a host too busy to answer sooner.
pub const HANDSHAKE_LIMIT: Duration = Duration::from_secs(5);

/// What every greeting begins with, in this version and all later ones; the version's byte follows.
const MAGIC: &[u8; 9] = b"longshore";

/// What a connection is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Purpose {
    /// Messages between the coordinator and a rank.
    Control,
    /// Bytes from one rank to another; the joiner tells its own rank.
    Data,
}

/// What whoever admits expects.
#[derive(Debug, Clone)]
pub struct Terms {
    /// The secret; `None` stands for a well-known one, which proves nothing: see [`same_user`](crate::link::same_user).
    pub secret: Option<Secret>,
    /// Ranks of the group.
    pub world_size: u32,
    /// How many times the launcher has restarted the group.
    pub attempt: u32,
    /// The longest a handshake may take.
    pub within: Duration,
    /// Which process this is, for whoever is admitted; `None` where that cannot be told.
    pub process: Option<ProcessIdentity>,
    /// Who was admitted, by whichever of the clones of these terms.
    pub admissions: Admissions,
}

impl Terms {
    /// Terms with the usual time limit.
    pub fn new(secret: Option<Secret>, world_size: u32, attempt: u32) -> Self {
        Self {
            secret,
            world_size,
            attempt,
            within: HANDSHAKE_LIMIT,
            process: ProcessIdentity::own().ok(),
            admissions: Admissions::default(),
        }
    }
}

/// Who was admitted: each rank once for each purpose, until it is forgotten. Clones are the same.
#[derive(Debug, Clone, Default)]
pub struct Admissions(Arc<Mutex<Places>>);

#[derive(Debug, Default)]
struct Places {
    taken: HashMap<(u32, Purpose), u64>,
    /// Tells one that took a place from those that had it before.
    tickets: u64,
}

impl Admissions {
    /// Forgets a rank that was lost, so that another process may join in its place. What the lost one has is not touched.
    pub fn forget(&self, rank: u32) {
        self.places().taken.retain(|(admitted, _), _| *admitted != rank);
    }

    /// Takes a rank's place; `None` if it is taken.
    fn take(&self, rank: u32, purpose: Purpose) -> Option<Admission> {
        let mut places = self.places();
        if places.taken.contains_key(&(rank, purpose)) {
            return None;
        }
        places.tickets += 1;
        let ticket = places.tickets;
        places.taken.insert((rank, purpose), ticket);
        drop(places);
        Some(Admission { of: self.clone(), place: (rank, purpose), ticket, kept: false })
    }

    fn places(&self) -> MutexGuard<'_, Places> {
        // they are consistent after every call
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A place that is given back unless it is kept: whoever goes away before it is welcomed has not joined.
#[derive(Debug)]
struct Admission {
    of: Admissions,
    place: (u32, Purpose),
    ticket: u64,
    kept: bool,
}

impl Admission {
    fn keep(mut self) {
        self.kept = true;
    }
}

impl Drop for Admission {
    fn drop(&mut self) {
        let mut places = self.of.places();
        // another may have it by now, if this one was forgotten
        if !self.kept && places.taken.get(&self.place) == Some(&self.ticket) {
            places.taken.remove(&self.place);
        }
    }
}

/// What whoever joins says of itself.
#[derive(Debug, Clone)]
pub struct Credentials {
    /// The secret; `None` stands for the well-known one.
    pub secret: Option<Secret>,
    /// The joiner's rank.
    pub rank: u32,
    /// Ranks of its group.
    pub world_size: u32,
    /// How many times the launcher has restarted the group.
    pub attempt: u32,
    /// What the connection is for.
    pub purpose: Purpose,
    /// The longest a handshake may take.
    pub within: Duration,
    /// Which process this is; `None` where that cannot be told.
    pub process: Option<ProcessIdentity>,
}

impl Credentials {
    /// Credentials with the usual time limit.
    pub fn new(
        secret: Option<Secret>,
        rank: u32,
        world_size: u32,
        attempt: u32,
        purpose: Purpose,
    ) -> Self {
        let (within, process) = (HANDSHAKE_LIMIT, ProcessIdentity::own().ok());
        Self { secret, rank, world_size, attempt, purpose, within, process }
    }
}

/// Who was admitted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Joined {
    /// Its rank, below the world size.
    pub rank: u32,
    /// What the connection is for.
    pub purpose: Purpose,
    /// Which process it is, where it could tell.
    pub process: Option<ProcessIdentity>,
}

/// Why one that knows the secret is not admitted; it is told.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
pub enum Mismatch {
    /// One side is left over from before a restart.
    #[error("an old generation: the joiner is of attempt {joiner}, the group of attempt {group}")]
    Attempt {
        /// The joiner's attempt.
        joiner: u32,
        /// The attempt of whoever admits.
        group: u32,
    },
    /// The two are not of one group.
    #[error("the joiner's group has {joiner} ranks, this one has {group}")]
    WorldSize {
        /// Ranks of the joiner's group.
        joiner: u32,
        /// Ranks of this one.
        group: u32,
    },
    /// There is no such rank.
    #[error("there is no rank {rank} among {world_size}")]
    Rank {
        /// The joiner's rank.
        rank: u32,
        /// Ranks of the group.
        world_size: u32,
    },
    /// The rank is there already: it has been replaced and is not known to be lost yet, there are two of it, or it is to join
    /// another group of the same processes.
    #[error("rank {rank} has joined already")]
    Joined {
        /// The joiner's rank.
        rank: u32,
    },
}

impl Mismatch {
    /// Whether trying again cannot help. It can where the other side is the older one, about to make room for its successor; where
    /// a rank's own predecessor is about to be found lost; and where the same processes are about to form another group, on the
    /// next port.
    pub fn is_final(&self) -> bool {
        match self {
            Mismatch::Attempt { joiner, group } => joiner <= group,
            Mismatch::Joined { .. } => false,
            Mismatch::WorldSize { .. } | Mismatch::Rank { .. } => true,
        }
    }
}

/// Why a connection was not admitted.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Refusal {
    /// The handshake was not finished in time.
    #[error("it did not join within {within:?}")]
    Silent {
        /// The limit.
        within: Duration,
    },
    /// It went away before it had joined.
    #[error("it closed the connection before it had joined")]
    Closed,
    /// What it sent is no frame, or too long a one.
    #[error("what it sent is no frame of a join")]
    Garbage(#[source] FrameError),
    /// What it sent is no message, or one of another version.
    #[error("what it sent is no join")]
    NoJoin(#[source] WireError),
    /// It does not know the secret.
    #[error("its proof is wrong: it has another secret")]
    Proof,
    /// It knows the secret and does not belong here.
    #[error(transparent)]
    Mismatch(Mismatch),
    /// Without a secret only the same user is admitted, and it is not that one, or cannot be seen to be.
    #[error("there is no secret, and the other end is not seen to be of the same user")]
    User(#[source] SameUserError),
    /// Others knocked after it, more than are heard at a time, and it had not joined.
    #[error("it had not joined when more connections came than are heard at a time")]
    Crowded,
    /// This side failed.
    #[error("the handshake failed")]
    Io(#[source] io::Error),
}

/// Why nobody admitted us.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum JoinError {
    /// Nothing there listens, or the connection failed.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// Whatever is there is none of ours: another port may be right.
    #[error("not a longshore coordinator: {0}")]
    Stranger(&'static str),
    /// It is one of ours, of another version.
    #[error("it speaks protocol version {theirs}, this is version {PROTOCOL_VERSION}")]
    Version {
        /// Its version.
        theirs: u8,
    },
    /// It greeted, and hung up when it saw our proof.
    #[error("it closed the connection on our proof: it has another secret")]
    Dropped,
    /// It greeted, and did not finish the handshake in time.
    #[error("it greeted, and did not answer within {within:?}")]
    Silent {
        /// The limit.
        within: Duration,
    },
    /// It answered something that is no answer.
    #[error("it greeted, and its answer is no frame of one")]
    Garbage(#[source] FrameError),
    /// It answered a message that is no answer.
    #[error("it greeted, and its answer is none")]
    NoAnswer(#[source] WireError),
    /// It does not know the secret.
    #[error("its proof is wrong: it has another secret")]
    Proof,
    /// It knows the secret and does not want us.
    #[error("it refused this rank")]
    Refused(#[source] Mismatch),
    /// Without a secret only the same user is trusted, and it is not that one, or cannot be seen to be.
    #[error("there is no secret, and the other end is not seen to be of the same user")]
    User(#[source] SameUserError),
}

/// What a joiner claims, and both sides prove.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Claim {
    rank: u32,
    world_size: u32,
    attempt: u32,
    purpose: Purpose,
    process: Option<ProcessIdentity>,
}

#[derive(Debug, Serialize, Deserialize)]
struct Join {
    claim: Claim,
    challenge: [u8; CHALLENGE_BYTES],
    proof: [u8; PROOF_BYTES],
}

#[derive(Debug, Serialize, Deserialize)]
enum Answer {
    Welcome { process: Option<ProcessIdentity>, proof: [u8; PROOF_BYTES] },
    Refused { why: Mismatch, proof: [u8; PROOF_BYTES] },
}

/// What an admitter greeted with.
#[derive(Debug)]
pub(crate) struct Greeting {
    challenge: [u8; CHALLENGE_BYTES],
}

/// Everything that a proof is over, except who makes it.
#[derive(Debug)]
struct Transcript {
    admitter: [u8; CHALLENGE_BYTES],
    joiner: [u8; CHALLENGE_BYTES],
    claim: Claim,
}

impl Transcript {
    fn prove(&self, secret: &Secret, role: &str, said: &[u8]) -> [u8; PROOF_BYTES] {
        self.with_parts(role, said, |parts| secret.prove(parts))
    }

    fn verify(&self, secret: &Secret, role: &str, said: &[u8], proof: &[u8]) -> bool {
        self.with_parts(role, said, |parts| secret.verify(parts, proof))
    }

    fn with_parts<T>(&self, role: &str, said: &[u8], then: impl FnOnce(&[&[u8]]) -> T) -> T {
        let Claim { rank, world_size, attempt, purpose, ref process } = self.claim;
        let purpose = match purpose {
            Purpose::Control => "control",
            Purpose::Data => "data",
        };
        let process = process_bytes(process.as_ref());
        then(&[
            MAGIC,
            &[PROTOCOL_VERSION],
            role.as_bytes(),
            &self.admitter,
            &self.joiner,
            &rank.to_le_bytes(),
            &world_size.to_le_bytes(),
            &attempt.to_le_bytes(),
            purpose.as_bytes(),
            &process,
            said,
        ])
    }
}

/// What a proof has of a process: nothing, or at least its numbers.
fn process_bytes(process: Option<&ProcessIdentity>) -> Vec<u8> {
    process.map_or_else(Vec::new, |ProcessIdentity { host, pid, start }| {
        [&pid.to_le_bytes()[..], &start.to_le_bytes(), host.as_bytes()].concat()
    })
}

const JOINER: &str = "joiner";
const ADMITTER: &str = "admitter";
const REFUSER: &str = "refuser";

/// The admitter's side: greets, hears the join, answers.
///
/// # Errors
/// Whoever is there does not belong here, or is too slow; only one that knows the secret was told why.
///
/// # Cancel safety
/// None: a stream whose handshake was dropped midway, or failed, is of no use but to be closed. The same goes for [`join`].
pub async fn admit<S>(stream: &mut S, terms: &Terms) -> Result<Joined, Refusal>
where
    S: AsyncRead + AsyncWrite + Unpin + Send,
{
    let within = terms.within;
    timeout(within, admit_at_leisure(stream, terms))
        .await
        .unwrap_or(Err(Refusal::Silent { within }))
}

async fn admit_at_leisure<S>(stream: &mut S, terms: &Terms) -> Result<Joined, Refusal>
where
    S: AsyncRead + AsyncWrite + Unpin + Send,
{
    let secret = secret_or_well_known(terms.secret.as_ref());
    let challenge = random().map_err(Refusal::Io)?;
    let greeting = [&MAGIC[..], &[PROTOCOL_VERSION], &challenge].concat();
    write_frame(stream, &greeting, STRANGER_FRAME_MAX).await.map_err(refused_by_frame)?;

    let join = read_frame(stream, STRANGER_FRAME_MAX).await.map_err(refused_by_frame)?;
    let Join { claim, challenge: theirs, proof } = wire::decode(&join).map_err(Refusal::NoJoin)?;
    let transcript = Transcript { admitter: challenge, joiner: theirs, claim };
    if !transcript.verify(&secret, JOINER, &[], &proof) {
        return Err(Refusal::Proof);
    }

    let place = place_for(&transcript.claim, terms);
    let answer = match &place {
        Ok(_) => {
            let process = terms.process.clone();
            let said = process_bytes(process.as_ref());
            Answer::Welcome { process, proof: transcript.prove(&secret, ADMITTER, &said) }
        }
        Err(why) => {
            let said = wire::encode(why).map_err(Refusal::NoJoin)?;
            Answer::Refused { why: why.clone(), proof: transcript.prove(&secret, REFUSER, &said) }
        }
    };
    let answer = wire::encode(&answer).map_err(Refusal::NoJoin)?;
    write_frame(stream, &answer, STRANGER_FRAME_MAX).await.map_err(refused_by_frame)?;
    place.map_err(Refusal::Mismatch)?.keep();
    let Claim { rank, purpose, process, .. } = transcript.claim;
    Ok(Joined { rank, purpose, process })
}

/// The place of one that knows the secret, or what keeps it out.
fn place_for(claim: &Claim, terms: &Terms) -> Result<Admission, Mismatch> {
    let Claim { rank, world_size, attempt, purpose, .. } = *claim;
    if attempt != terms.attempt {
        return Err(Mismatch::Attempt { joiner: attempt, group: terms.attempt });
    }
    if world_size != terms.world_size {
        return Err(Mismatch::WorldSize { joiner: world_size, group: terms.world_size });
    }
    if rank >= world_size {
        return Err(Mismatch::Rank { rank, world_size });
    }
    terms.admissions.take(rank, purpose).ok_or(Mismatch::Joined { rank })
}

/// The joiner's side, whole. Returns which process has admitted it, where that could tell.
///
/// # Errors
/// Nobody of ours is there, or we are not wanted.
pub async fn join<S>(
    stream: &mut S,
    credentials: &Credentials,
) -> Result<Option<ProcessIdentity>, JoinError>
where
    S: AsyncRead + AsyncWrite + Unpin + Send,
{
    let greeting = hear_greeting(stream, credentials.within).await?;
    answer_greeting(stream, credentials, greeting).await
}

/// The joiner's first step: is this one of ours?
pub(crate) async fn hear_greeting<S>(
    stream: &mut S,
    within: Duration,
) -> Result<Greeting, JoinError>
where
    S: AsyncRead + Unpin + Send,
{
    let heard = timeout(within, read_frame(stream, STRANGER_FRAME_MAX)).await;
    let greeting = match heard {
        Err(_) => return Err(JoinError::Stranger("it said nothing")),
        Ok(Err(FrameError::Io(e))) if is_close(&e) => {
            return Err(JoinError::Stranger("it closed the connection without a word"));
        }
        Ok(Err(FrameError::Io(e))) => return Err(JoinError::Io(e)),
        Ok(Err(_)) => return Err(JoinError::Stranger("it says something else")),
        Ok(Ok(frame)) => frame,
    };
    let stranger = JoinError::Stranger("it says something else");
    match greeting.strip_prefix(MAGIC).and_then(<[u8]>::split_first) {
        Some((&PROTOCOL_VERSION, challenge)) => match challenge.try_into() {
            Ok(challenge) => Ok(Greeting { challenge }),
            Err(_) => Err(stranger),
        },
        Some((&theirs, _)) => Err(JoinError::Version { theirs }),
        None => Err(stranger),
    }
}

/// The joiner's second step: proves itself, and hears whether it is wanted.
pub(crate) async fn answer_greeting<S>(
    stream: &mut S,
    credentials: &Credentials,
    greeting: Greeting,
) -> Result<Option<ProcessIdentity>, JoinError>
where
    S: AsyncRead + AsyncWrite + Unpin + Send,
{
    let secret = secret_or_well_known(credentials.secret.as_ref());
    let &Credentials { rank, world_size, attempt, purpose, within, ref process, .. } = credentials;
    let claim = Claim { rank, world_size, attempt, purpose, process: process.clone() };
    let challenge = random()?;
    let (admitter, joiner) = (greeting.challenge, challenge);
    let transcript = Transcript { admitter, joiner, claim: claim.clone() };
    let proof = transcript.prove(&secret, JOINER, &[]);
    let join = wire::encode(&Join { claim, challenge, proof }).map_err(JoinError::NoAnswer)?;

    let answer = timed(within, async {
        write_frame(stream, &join, STRANGER_FRAME_MAX).await?;
        read_frame(stream, STRANGER_FRAME_MAX).await
    });
    match wire::decode(&answer.await?).map_err(JoinError::NoAnswer)? {
        Answer::Welcome { process, proof } => {
            let said = process_bytes(process.as_ref());
            match transcript.verify(&secret, ADMITTER, &said, &proof) {
                true => Ok(process),
                false => Err(JoinError::Proof),
            }
        }
        Answer::Refused { why, proof } => {
            let said = wire::encode(&why).map_err(JoinError::NoAnswer)?;
            // whoever does not know the secret cannot send a rank away for good either
            match transcript.verify(&secret, REFUSER, &said, &proof) {
                true => Err(JoinError::Refused(why)),
                false => Err(JoinError::Proof),
            }
        }
    }
}

async fn timed(
    within: Duration,
    answer: impl Future<Output = Result<Vec<u8>, FrameError>>,
) -> Result<Vec<u8>, JoinError> {
    match timeout(within, answer).await {
        Err(_) => Err(JoinError::Silent { within }),
        Ok(Err(FrameError::Io(e))) if is_close(&e) => Err(JoinError::Dropped),
        Ok(Err(FrameError::Io(e))) => Err(JoinError::Io(e)),
        Ok(answer) => answer.map_err(JoinError::Garbage),
    }
}

fn secret_or_well_known(secret: Option<&Secret>) -> Secret {
    secret.cloned().unwrap_or_else(|| Secret::from_text(""))
}

fn refused_by_frame(error: FrameError) -> Refusal {
    match error {
        FrameError::Io(e) if is_close(&e) => Refusal::Closed,
        FrameError::Io(e) => Refusal::Io(e),
        other => Refusal::Garbage(other),
    }
}

/// Whether `error` says that the other side has gone.
pub(crate) fn is_close(error: &io::Error) -> bool {
    use io::ErrorKind::{BrokenPipe, ConnectionAborted, ConnectionReset, UnexpectedEof};
    matches!(error.kind(), BrokenPipe | ConnectionAborted | ConnectionReset | UnexpectedEof)
}

#[cfg(test)]
mod tests;
