//! A request's way: what it is about, what happens to it, what is answered.

use std::convert::Infallible;
use std::future::pending;
use std::io;
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use hyper::header::{HeaderName, HeaderValue};
use hyper::{Method, Response, StatusCode};
use tokio::task::block_in_place;
use tokio::time::sleep;

use crate::connection::Connection;
use crate::content::{Body, Content, Object, Tree};
use crate::dialect::hub::Hub;
use crate::dialect::{self, Site, Subject};
use crate::fault::{self, Action, Faults, Operation};
use crate::log::{Entry, Log, Request};
use crate::options::{Dialect, Options};
use crate::outgoing::Outgoing;
use crate::reply::{Failure, Reply};
use crate::request::{Ask, Asked, names};

/// What all connections of a server share.
#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) options: Options,
    pub(crate) content: Content,
    pub(crate) faults: Mutex<Faults>,
    pub(crate) log: Arc<Log>,
    pub(crate) hub: Hub,
    pub(crate) ports: Vec<(Dialect, u16)>,
}

impl Shared {
    /// The URL of a dialect, without a slash at its end.
    pub(crate) fn url(&self, dialect: Dialect) -> String {
        let port =
            self.ports.iter().find(|(known, _)| *known == dialect).map_or(0, |(_, port)| *port);
        format!("http://127.0.0.1:{port}")
    }
}

/// Answers a request. An error closes the connection without an answer.
pub(crate) async fn serve<T>(
    shared: Arc<Shared>,
    connection: Arc<Connection>,
    dialect: Dialect,
    request: hyper::Request<T>,
) -> io::Result<Response<Outgoing>> {
    let ask = Ask::new(dialect, &request);
    let subject = dialect::subject(&ask, &shared.options);
    let operation = operation(&ask, &subject);
    let entry = shared.log.enter(logged(&ask, &subject, operation, request.method(), &connection));

    let mut object = find(&shared.content, &subject);
    let actions = decide(&shared, &ask, &subject, operation, object.as_ref());
    entry.update(|request| request.actions.clone_from(&actions));
    if actions.contains(&Action::ChangeEtag)
        && let Some(tree) = tree(&shared.content, &subject)
    {
        tree.give(subject.object(), |given| given.replaced += 1);
        object = find(&shared.content, &subject);
    }
    before_headers(&actions, &connection).await?;

    let readable = matches!(*request.method(), Method::GET | Method::HEAD);
    let reply = match instead(&ask, &actions) {
        Some(instead) => instead,
        None if !readable => Err(Failure::usual(501, None)),
        // the hub reads files in whole for their digests
        None if dialect == Dialect::Hub => {
            block_in_place(|| answer(&shared, &ask, &subject, object, &actions))
        }
        None => answer(&shared, &ask, &subject, object, &actions),
    };
    let reply = reply.unwrap_or_else(|failure| {
        let mut reply = dialect::failure(&ask, &failure);
        reply.headers.extend(failure.headers);
        reply
    });
    Ok(respond(&connection, &ask, reply, &actions, entry))
}

fn operation(ask: &Ask, subject: &Subject) -> Operation {
    match subject {
        Subject::Object { .. } if dialect::is_metadata(ask) => Operation::Head,
        Subject::Object { .. } => Operation::Get,
        Subject::List { .. } => Operation::List,
        Subject::Bucket { .. } | Subject::Credentials | Subject::Other => Operation::Info,
    }
}

fn logged(
    ask: &Ask,
    subject: &Subject,
    operation: Operation,
    method: &Method,
    connection: &Connection,
) -> Request {
    Request {
        dialect: ask.dialect,
        connection: connection.number,
        method: method.to_string(),
        target: ask.target.clone(),
        host: ask.host.clone(),
        operation,
        bucket: subject.bucket().to_owned(),
        object: subject.object().to_owned(),
        range: ask.range_header().map(str::to_owned),
        if_match: ask.if_match().map(str::to_owned),
        user_agent: ask.header("user-agent").map(str::to_owned),
        authorization: ask.authorization().is_some(),
        actions: Vec::new(),
        status: 0,
        sent_bytes: 0,
        started: Duration::ZERO,
        ended: None,
    }
}

/// The state of the bucket that is asked for.
fn tree(content: &Content, subject: &Subject) -> Option<Arc<Tree>> {
    content.bucket(subject.bucket())?.revision(subject.revision())
}

fn find(content: &Content, subject: &Subject) -> Option<Object> {
    tree(content, subject)?.object(subject.object())
}

fn decide(
    shared: &Shared,
    ask: &Ask,
    subject: &Subject,
    operation: Operation,
    object: Option<&Object>,
) -> Vec<Action> {
    let range = object.map(|object| match ask.range(object.size) {
        Asked::Whole => 0..object.size,
        Asked::Part(range) => range,
        Asked::Nothing => object.size..object.size,
    });
    let (dialect, bucket, object) = (ask.dialect, subject.bucket(), subject.object());
    let subject = fault::Subject { dialect, operation, bucket, object, range };
    shared.faults.lock().unwrap_or_else(PoisonError::into_inner).decide(&subject)
}

/// What happens before there is an answer.
async fn before_headers(actions: &[Action], connection: &Arc<Connection>) -> io::Result<()> {
    for action in actions {
        match *action {
            Action::Delay(duration) => sleep(duration).await,
            Action::Stall { at: None, duration: Some(duration) } => sleep(duration).await,
            Action::Stall { at: None, duration: None } => {
                let never: Infallible = pending().await;
                match never {}
            }
            Action::Reset { at: None } => {
                connection.reset_when_closed();
                return Err(io::ErrorKind::ConnectionReset.into());
            }
            _ => {}
        }
    }
    Ok(())
}

/// What is answered instead, if an action says so.
fn instead(ask: &Ask, actions: &[Action]) -> Option<Result<Reply, Failure>> {
    actions.iter().find_map(|action| match action {
        Action::Status { status, code, retry_after_s } => {
            let failure = Failure::usual(*status, code.as_deref());
            Some(Err(match retry_after_s {
                Some(seconds) => failure.header("retry-after", seconds),
                None => failure,
            }))
        }
        Action::Redirect { .. } if ask.query("redirected").is_some() => None,
        Action::Redirect { to } => {
            let mark = if ask.target.contains('?') { '&' } else { '?' };
            let same = format!("http://{}{}{mark}redirected=1", ask.host, ask.target);
            let to = to.clone().unwrap_or(same);
            Some(Ok(Reply::empty(307).header("location", to)))
        }
        _ => None,
    })
}

fn answer(
    shared: &Shared,
    ask: &Ask,
    subject: &Subject,
    object: Option<Object>,
    actions: &[Action],
) -> Result<Reply, Failure> {
    let (options, hub, cdn_url) = (&shared.options, &shared.hub, shared.url(Dialect::Cdn));
    let now = SystemTime::now() + options.clock_ahead;
    let site = Site { options, now, hub, cdn_url };
    if *subject == Subject::Credentials {
        return dialect::s3::credentials(ask, &site);
    }
    let Some(bucket) = shared.content.bucket(subject.bucket()) else {
        dialect::permit(ask, options.private, &site)?;
        return Err(dialect::no_bucket(ask, subject.bucket()));
    };
    dialect::permit(ask, bucket.private.unwrap_or(options.private), &site)?;
    if let Some(region) = &bucket.region
        && ask.dialect == Dialect::S3
    {
        return Err(dialect::s3::elsewhere(subject.bucket(), region));
    }
    let Some(tree) = bucket.revision(subject.revision()) else {
        return Err(Failure::new(404, "RevisionNotFound", "Invalid rev id"));
    };
    match subject {
        Subject::Object { name, .. } => {
            let missing = || Failure::usual(404, Some("NoSuchKey")).element("Key", name);
            let object = object.ok_or_else(missing)?;
            let instead = dialect::instead_of_content(ask, subject, &tree, &object, &site)?;
            instead.map_or_else(|| content(ask, &tree, &object, actions), Ok)
        }
        Subject::List { .. } => Ok(dialect::list(ask, subject, &tree, &site)),
        Subject::Bucket { .. } => Ok(dialect::bucket(ask, subject, &bucket, &tree, &site)),
        Subject::Credentials | Subject::Other => Err(Failure::usual(501, None)),
    }
}

/// The content of an object, by range and conditions.
fn content(ask: &Ask, tree: &Tree, object: &Object, actions: &[Action]) -> Result<Reply, Failure> {
    if ask.if_match().is_some_and(|tags| !names(tags, &object.etag)) {
        return Err(Failure::usual(412, None).element("Condition", "If-Match"));
    }
    if ask.if_none_match().is_some_and(|tags| names(tags, &object.etag)) {
        return Ok(Reply::empty(304).header("etag", &object.etag));
    }
    let (range, partial) = match ask.range(object.size) {
        _ if actions.contains(&Action::IgnoredRange) => (0..object.size, false),
        Asked::Whole => (0..object.size, false),
        Asked::Part(range) => (shortened(range, actions), true),
        Asked::Nothing => {
            return Err(Failure::usual(416, None)
                .header("content-range", format!("bytes */{}", object.size))
                .element("ActualObjectSize", object.size));
        }
    };
    let mut reply = Reply::empty(if partial { 206 } else { 200 });
    reply.headers = vec![("content-type".to_owned(), "binary/octet-stream".to_owned())];
    if partial {
        let later = u64::from(actions.contains(&Action::WrongContentRange));
        let (first, last) = (range.start + later, range.end - 1 + later);
        let value = format!("bytes {first}-{last}/{}", object.size);
        reply = reply.header("content-range", value);
    }
    reply = reply
        .header("accept-ranges", "bytes")
        .header("etag", &object.etag)
        .header("last-modified", httpdate::fmt_http_date(object.modified));
    reply.headers.extend(dialect::object_headers(ask, tree, object));
    reply.headers.extend(object.headers.iter().cloned());
    Ok(Reply { body: object.body.clone(), range, ..reply })
}

fn shortened(range: Range<u64>, actions: &[Action]) -> Range<u64> {
    let missing = actions.iter().find_map(|action| match action {
        Action::ShortRange { bytes } => Some(*bytes),
        _ => None,
    });
    let end = range.end.saturating_sub(missing.unwrap_or(0)).max(range.start + 1);
    range.start..end
}

/// The response; what happens to its body happens while it is sent.
fn respond(
    connection: &Arc<Connection>,
    ask: &Ask,
    reply: Reply,
    actions: &[Action],
    entry: Entry,
) -> Response<Outgoing> {
    entry.update(|request| request.status = reply.status);
    let length = reply.range.end - reply.range.start;
    let bodyless = ask.head || reply.status == 304;
    let (body, range) = match bodyless {
        true => (Body::Memory(bytes::Bytes::new()), 0..0),
        false => (reply.body, reply.range),
    };
    let actions = if bodyless { &[] } else { actions };
    let body = Outgoing::new(body, range, actions, connection, entry);
    let mut response = Response::new(body);
    *response.status_mut() = StatusCode::from_u16(reply.status).unwrap_or(StatusCode::IM_A_TEAPOT);
    let headers = response.headers_mut();
    if reply.status != 304 {
        headers.insert(hyper::header::CONTENT_LENGTH, length.into());
    }
    for (name, value) in &reply.headers {
        let name = HeaderName::try_from(name.as_str());
        if let (Ok(name), Ok(value)) = (name, HeaderValue::try_from(value.as_str())) {
            headers.append(name, value);
        }
    }
    response
}
