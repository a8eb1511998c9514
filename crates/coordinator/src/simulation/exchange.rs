//! How ranks reach each other in one generation, and pass bytes round by round, as `processes::join` and
//! `longshore_rank::exchange` do it over TCP.

use std::{cell::Cell, net::SocketAddr, rc::Rc, time::Duration};

use longshore_rank::{
    collective::CollectiveError,
    error::RankError,
    protocol::{Endpoint, Generation, LoadPlan, Read},
};
use serde::{Deserialize, Serialize};
use tokio::{
    task::{AbortHandle, JoinSet},
    time::{sleep, timeout},
};
use turmoil::net::{
    TcpListener, TcpStream,
    tcp::{OwnedReadHalf, OwnedWriteHalf},
};

use crate::{
    link::{
        frame::{FRAME_MAX, read_frame, write_frame},
        handshake::{self, Credentials, Purpose, Terms},
        wire,
    },
    simulation::{
        group::Group,
        job::{Job, Landed, for_each_span},
        rank::WorkerEvent,
    },
};

/// How long ranks that have announced themselves may take to reach each other.
const JOIN_LIMIT: Duration = Duration::from_secs(1);

/// From one attempt to reach a rank to the next.
const TRY_AGAIN: Duration = Duration::from_millis(50);

/// A connection to each other rank.
#[derive(Debug)]
pub(super) struct Streams(Vec<Option<TcpStream>>);

/// What goes over them. The generation is not looked at but by who watches.
#[derive(Debug, Serialize, Deserialize)]
struct Round {
    generation: Generation,
    /// Nothing for the barrier that all join with.
    round: Option<u32>,
    bytes: Vec<u8>,
}

/// Joins the other ranks of a generation; the higher rank of two connects.
///
/// # Errors
/// One cannot be reached in time.
pub(super) async fn join(
    group: Rc<Group>,
    generation: Generation,
    listener: TcpListener,
    roster: Vec<Endpoint>,
) -> Result<Streams, RankError> {
    let &Group { rank, ranks, .. } = &*group;
    let streams: Vec<Cell<Option<TcpStream>>> = roster.iter().map(|_| Cell::default()).collect();
    let joining = async {
        let accepting = accept((rank, ranks), listener, &streams);
        let connecting = async {
            for (other, endpoint) in roster.iter().enumerate().take(rank as usize) {
                streams[other].set(Some(connect((rank, ranks), endpoint.address).await));
            }
        };
        tokio::join!(accepting, connecting);
    };
    let joined = timeout(JOIN_LIMIT, joining).await;
    let mut streams: Vec<Option<TcpStream>> = streams.into_iter().map(Cell::into_inner).collect();
    if joined.is_err() {
        let missing = (0..).zip(&streams).find(|(r, s)| *r != rank && s.is_none());
        return Err(unreachable(missing.map_or(0, |(r, _)| r), "it did not connect in time"));
    }
    for (other, stream) in (0..).zip(&mut streams) {
        let Some(stream) = stream else { continue };
        let barrier = Round { generation, round: None, bytes: Vec::new() };
        send(stream, &barrier).await.map_err(|e| unreachable(other, &e))?;
    }
    for (other, stream) in (0..).zip(&mut streams) {
        let Some(stream) = stream else { continue };
        let passed = timeout(JOIN_LIMIT, receive(stream)).await;
        let passed = passed.map_err(|_| unreachable(other, "it did not pass the barrier"))?;
        passed.map_err(|e| unreachable(other, &e))?;
    }
    Ok(Streams(streams))
}

fn unreachable(with: u32, what: &str) -> RankError {
    CollectiveError::Connection { with, what: what.to_owned() }.into()
}

/// Takes the connections of all higher ranks.
async fn accept(
    (rank, ranks): (u32, u32),
    listener: TcpListener,
    streams: &[Cell<Option<TcpStream>>],
) {
    let terms = Terms::new(None, ranks, 0);
    let mut missing = ranks - rank - 1;
    let mut handshakes = JoinSet::new();
    while missing > 0 {
        tokio::select! {
            biased;
            accepted = listener.accept() => {
                let (Ok((mut stream, _)), terms) = (accepted, terms.clone()) else { continue };
                handshakes.spawn_local(async move {
                    let joined = handshake::admit(&mut stream, &terms).await.ok()?;
                    Some((joined, stream))
                });
            }
            Some(heard) = handshakes.join_next() => {
                let Ok(Some((joined, stream))) = heard else { continue };
                if joined.purpose == Purpose::Data && joined.rank > rank {
                    missing -= 1;
                    streams[joined.rank as usize].set(Some(stream));
                }
            }
        }
    }
}

async fn connect((rank, ranks): (u32, u32), address: SocketAddr) -> TcpStream {
    let credentials = Credentials::new(None, rank, ranks, 0, Purpose::Data);
    loop {
        if let Ok(mut stream) = TcpStream::connect(address).await
            && handshake::join(&mut stream, &credentials).await.is_ok()
        {
            return stream;
        }
        sleep(TRY_AGAIN).await;
    }
}

async fn send<S>(stream: &mut S, round: &Round) -> Result<(), String>
where
    S: tokio::io::AsyncWrite + Unpin,
{
    let frame = wire::encode(round).map_err(|e| e.to_string())?;
    write_frame(stream, &frame, FRAME_MAX).await.map_err(|e| e.to_string())
}

async fn receive<S>(stream: &mut S) -> Result<Round, String>
where
    S: tokio::io::AsyncRead + Unpin,
{
    let frame = read_frame(stream, FRAME_MAX).await.map_err(|e| e.to_string())?;
    wire::decode(&frame).map_err(|e| e.to_string())
}

/// Starts the tasks of a job's exchange: one that sends, and one that receives for each other rank.
pub(super) fn start(job: &Rc<Job>, Streams(streams): Streams) -> Vec<AbortHandle> {
    let mut senders: Vec<Option<OwnedWriteHalf>> = Vec::new();
    let mut receivers = Vec::new();
    for (other, stream) in (0..).zip(streams) {
        let (reader, writer) = stream.map(TcpStream::into_split).unzip();
        receivers.extend(reader.map(|reader| (other, reader)));
        senders.push(writer);
    }
    let left = Rc::new(Cell::new(1 + receivers.len()));
    let mut tasks = vec![job.world.spawn(send_all(Rc::clone(job), senders, Rc::clone(&left)))];
    for (other, reader) in receivers {
        let receiving = receive_all(Rc::clone(job), other, reader, Rc::clone(&left));
        tasks.push(job.world.spawn(receiving));
    }
    tasks
}

/// One part of the exchange is done; its connections are kept until the load is over everywhere.
async fn done(job: &Job, left: &Cell<usize>) {
    left.set(left.get() - 1);
    if left.get() == 0 {
        job.tell(WorkerEvent::ExchangeDone);
    }
    std::future::pending::<()>().await;
}

/// A rank's reads that are exchanged, in the order of their rounds.
fn pooled(plan: &LoadPlan, rank: u32) -> impl Iterator<Item = (u32, Read)> {
    plan.reads[rank as usize].iter().filter_map(|read| Some((read.round?, *read)))
}

async fn send_all(job: Rc<Job>, mut senders: Vec<Option<OwnedWriteHalf>>, left: Rc<Cell<usize>>) {
    let plan = std::sync::Arc::clone(&job.plan);
    for (round, read) in pooled(&plan, job.rank) {
        let slot = loop {
            let contributed = job.contributed.notified();
            if let Some(slot) = job.filled.borrow_mut().remove(&round) {
                break slot;
            }
            contributed.await;
        };
        for (other, sender) in (0..).zip(&mut senders) {
            let Some(sender) = sender else { continue };
            let mut bytes = Vec::new();
            for span in job.spans(&read, other) {
                for row in 0..span.rows {
                    let at = (span.source_offset + row * span.source_stride) as usize;
                    bytes.extend_from_slice(&slot[at..at + span.width as usize]);
                }
            }
            if bytes.is_empty() {
                continue;
            }
            let round = Round { generation: job.generation, round: Some(round), bytes };
            let breaks = std::mem::take(&mut job.world.breaks.borrow_mut()[job.seat as usize]);
            let sent = if breaks { Err("broken".to_owned()) } else { send(sender, &round).await };
            if let Err(e) = sent {
                return fail(&job, other, &e);
            }
        }
        job.give_back();
    }
    done(&job, &left).await;
}

async fn receive_all(job: Rc<Job>, source: u32, mut reader: OwnedReadHalf, left: Rc<Cell<usize>>) {
    let plan = std::sync::Arc::clone(&job.plan);
    for (round, read) in pooled(&plan, source) {
        let mut expected = 0;
        for_each_span(&plan, &read, |r| r == job.rank, |span| expected += span.source_bytes());
        if expected == 0 {
            continue;
        }
        let (received, limit) = &job.slots.received;
        let received = &received[source as usize];
        loop {
            let freed = job.slots.freed.notified();
            if received.get() < *limit {
                break;
            }
            freed.await;
        }
        let arrived = match receive(&mut reader).await {
            Ok(arrived) => arrived,
            Err(e) => return fail(&job, source, &e),
        };
        let Round { generation, round: of, bytes } = arrived;
        if of != Some(round) || bytes.len() as u64 != expected {
            let (rank, found) = (job.rank, bytes.len());
            job.world.violate(format!(
                "rank {source} sends rank {rank} {found} bytes in round {of:?}, not {expected} in {round}"
            ));
            return;
        }
        received.set(received.get() + 1);
        job.land_later(Landed { source, generation, read, bytes });
    }
    done(&job, &left).await;
}

/// The connection to another rank has failed; whoever stopped the rank knows why.
fn fail(job: &Job, with: u32, what: &str) {
    if !job.is_stopped() {
        job.give_up(unreachable(with, what));
    }
}
