//! Requests: rank 0 takes them one by one and tells the other ranks, then all compute.
//!
//! Ranks that have nothing to do make sure now and then that all are still there: one that is gone is noticed whether or
//! not there are requests.

use std::{
    io::{self, BufRead, BufReader, Read, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    sync::mpsc::{self, Receiver, RecvTimeoutError, SyncSender},
    thread,
    time::Duration,
};

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::{
    Failure,
    model::{Group, Model, ModelError, Params},
    ranks::Ranks,
};

/// What rank 0 tells the others.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum Word {
    /// Continue these tokens by so many.
    Generate { tokens: Vec<u32>, steps: usize },
    /// Answer.
    StillThere,
    /// There will be no more.
    End,
}

/// Tokens that follow others, each the likeliest.
#[derive(Debug)]
pub(crate) struct Continuation {
    tokens: Vec<u32>,
    /// Of the last step.
    pub(crate) logits: Vec<f32>,
}

/// Continues `prompt` by `steps` tokens. All ranks of `group` call it with the same numbers.
pub(crate) fn generate(
    model: &Model,
    params: &impl Params,
    group: &mut impl Group,
    prompt: &[u32],
    steps: usize,
) -> Result<Continuation, ModelError> {
    let (mut tokens, mut logits) = (prompt.to_vec(), Vec::new());
    for _ in 0..steps {
        logits = model.forward(params, group, &tokens)?;
        let likeliest = logits.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1));
        tokens.extend(likeliest.map(|(token, _)| token as u32));
    }
    Ok(Continuation { tokens: tokens.split_off(prompt.len()), logits })
}

/// The other ranks: do what rank 0 says, until the end.
pub(crate) fn follow(
    model: &Model,
    params: &impl Params,
    ranks: &mut Ranks,
) -> Result<(), Failure> {
    loop {
        match ranks.hear()? {
            Word::Generate { tokens, steps } => {
                match generate(model, params, ranks, &tokens, steps) {
                    Err(e @ ModelError::Group(_)) => return Err(e.into()),
                    // refused on all ranks alike; rank 0 answers
                    _ => continue,
                }
            }
            Word::StillThere => drop(ranks.all_gather(&[])?),
            Word::End => return Ok(()),
        }
    }
}

/// After so long without a request the ranks make sure that all are there.
const IDLE: Duration = Duration::from_secs(1);

/// Rank 0: takes requests at `address` until one of them says that it is enough.
pub(crate) fn lead(
    address: SocketAddr,
    model: &Model,
    params: &impl Params,
    ranks: &mut Ranks,
) -> Result<(), Failure> {
    let (address, requests) =
        listen(address).map_err(|source| Failure::Listen { address, source })?;
    println!("listening on {address}");
    loop {
        let (line, answer) = match requests.recv_timeout(IDLE) {
            Ok(request) => request,
            Err(RecvTimeoutError::Timeout) => {
                ranks.tell(&Word::StillThere)?;
                ranks.all_gather(&[])?;
                continue;
            }
            Err(RecvTimeoutError::Disconnected) => {
                let source = io::Error::other("no connection can be accepted any more");
                return Err(Failure::Listen { address, source });
            }
        };
        let said = match serde_json::from_str::<Request>(&line) {
            Err(e) => json!({ "error": e.to_string() }),
            Ok(Request { quit: true, .. }) => return Ok(ranks.tell(&Word::End)?),
            Ok(request) => serve(request, model, params, ranks)?,
        };
        // whoever asked may have gone away
        let _ = answer.send(said.to_string());
    }
}

/// A line that a client sends.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Request {
    #[serde(default)]
    tokens: Vec<u32>,
    #[serde(default)]
    steps: usize,
    #[serde(default)]
    quit: bool,
}

/// Every step computes all tokens anew, so long sequences would keep everyone else waiting.
const TOKENS_MAX: usize = 1024;

/// The answer to a request; an error only where the ranks can go on no longer.
fn serve(
    request: Request,
    model: &Model,
    params: &impl Params,
    ranks: &mut Ranks,
) -> Result<Value, Failure> {
    let Request { tokens, steps, .. } = request;
    if steps == 0 || tokens.len().saturating_add(steps) > TOKENS_MAX {
        let why = format!("at least one step, and at most {TOKENS_MAX} tokens and steps together");
        return Ok(json!({ "error": why }));
    }
    ranks.tell(&Word::Generate { tokens: tokens.clone(), steps })?;
    match generate(model, params, ranks, &tokens, steps) {
        Ok(Continuation { tokens, logits }) => {
            let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            Ok(json!({ "tokens": tokens, "logits_max": largest }))
        }
        Err(e @ ModelError::Group(_)) => Err(e.into()),
        Err(e) => Ok(json!({ "error": e.to_string() })),
    }
}

/// A line, and where its answer goes.
type Asked = (String, SyncSender<String>);

/// Takes lines from whoever connects.
fn listen(address: SocketAddr) -> io::Result<(SocketAddr, Receiver<Asked>)> {
    let listener = TcpListener::bind(address)?;
    let address = listener.local_addr()?;
    let (ask, requests) = mpsc::sync_channel(16);
    thread::spawn(move || {
        for stream in listener.incoming() {
            // gone before it was accepted
            let Ok(stream) = stream else { continue };
            let ask = ask.clone();
            // a client that fails or leaves is no loss to the others
            thread::spawn(move || drop(converse(&stream, &ask)));
        }
    });
    Ok((address, requests))
}

/// Longer than any request that is served.
const LINE_BYTES_MAX: u64 = 64 << 10;

fn converse(mut stream: &TcpStream, ask: &SyncSender<Asked>) -> io::Result<()> {
    let mut lines = BufReader::new(stream);
    loop {
        let mut line = String::new();
        if lines.by_ref().take(LINE_BYTES_MAX).read_line(&mut line)? == 0 {
            return Ok(());
        }
        let (answer, answered) = mpsc::sync_channel(1);
        ask.send((line, answer)).map_err(io::Error::other)?;
        let answer = answered.recv().map_err(io::Error::other)?;
        stream.write_all(format!("{answer}\n").as_bytes())?;
    }
}
