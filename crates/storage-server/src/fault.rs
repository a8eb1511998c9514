//! What goes wrong, when: rules match requests, and each match takes an action.

use std::collections::HashMap;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::ops::Range;
use std::time::Duration;

use crate::options::Dialect;

/// What a request asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Operation {
    /// The content of an object.
    Get,
    /// The headers of an object.
    Head,
    /// The names of objects.
    List,
    /// What the hub says about a repository, or S3 about a bucket.
    Info,
}

/// A position in the body of a response.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum At {
    /// After the headers, before the first byte.
    Start,
    /// After this many bytes, or at the end of a shorter body.
    Bytes(u64),
    /// Half way.
    Middle,
    /// With one byte left.
    LastByte,
    /// Before the byte at this offset of the object; at the start or the end of bodies without it.
    Offset(u64),
}

impl At {
    /// The position in the body of `range` of an object, in bytes.
    pub(crate) fn resolve(self, range: &Range<u64>) -> u64 {
        let length = range.end - range.start;
        match self {
            Self::Start => 0,
            Self::Bytes(bytes) => bytes.min(length),
            Self::Middle => length / 2,
            Self::LastByte => length.saturating_sub(1),
            Self::Offset(offset) => offset.clamp(range.start, range.end) - range.start,
        }
    }
}

/// What happens to a request. Actions of several rules add up; of those that replace the answer, the first one counts.
#[derive(Clone, Debug, PartialEq)]
pub enum Action {
    /// Answers with an error, in the form of the dialect.
    Status {
        /// The status.
        status: u16,
        /// The error's code; without, the one that services use with this status.
        code: Option<String>,
        /// The value of `Retry-After`, in seconds.
        retry_after_s: Option<u64>,
    },
    /// Answers 307. Without a target, the same URL with `redirected=1` in its query, for which redirects are over.
    Redirect {
        /// The value of `Location`.
        to: Option<String>,
    },
    /// Answers later by this.
    Delay(Duration),
    /// Says nothing: before the headers, or from a position on; for a time or for ever.
    Stall {
        /// Where in the body; without, before the headers.
        at: Option<At>,
        /// For how long; without, until the client goes away.
        duration: Option<Duration>,
    },
    /// Resets the connection (RST), once the client's side has all that is to be sent before.
    Reset {
        /// Where in the body; without, before the headers.
        at: Option<At>,
    },
    /// Closes the connection (FIN) early, although the headers promise the whole body.
    Truncate {
        /// Where in the body.
        at: At,
    },
    /// Answers with so many bytes less than asked for, with headers that match.
    ShortRange {
        /// How many bytes are missing at the end. At least one byte is sent.
        bytes: u64,
    },
    /// Says in `Content-Range` that the body begins one byte later than it does.
    WrongContentRange,
    /// Answers with the whole object and 200.
    IgnoredRange,
    /// The object has another ETag and generation from now on, and the same content.
    ChangeEtag,
    /// The byte at this position is a wrong one; nothing else tells.
    Corrupt {
        /// Where in the body.
        at: At,
    },
    /// Sends so many bytes per interval from a position on.
    Trickle {
        /// From where in the body.
        at: At,
        /// How many bytes at once.
        bytes: u64,
        /// What passes between them.
        interval: Duration,
    },
    /// Bytes per second that the connection gets, over all of its requests with such a rule.
    Bandwidth(u64),
}

impl Action {
    /// Answers with an error: its code is the one that services use with this status.
    pub fn status(status: u16) -> Self {
        Self::Status { status, code: None, retry_after_s: None }
    }

    /// Answers with an error of this code, with the status that S3 gives it.
    pub fn error(code: &str) -> Self {
        let status = match code {
            "AuthorizationHeaderMalformed" | "ExpiredToken" | "RequestTimeout" => 400,
            "AccessDenied" | "RequestTimeTooSkewed" | "InvalidAccessKeyId" => 403,
            "SignatureDoesNotMatch" => 403,
            "NoSuchKey" | "NoSuchBucket" => 404,
            "PermanentRedirect" => 301,
            "PreconditionFailed" => 412,
            "InvalidRange" => 416,
            "TooManyRequests" => 429,
            "SlowDown" | "ServiceUnavailable" => 503,
            _ => 500,
        };
        Self::Status { status, code: Some(code.to_owned()), retry_after_s: None }
    }

    /// Answers 429 with `Retry-After`.
    pub fn too_many_requests(retry_after_s: u64) -> Self {
        Self::Status { status: 429, code: None, retry_after_s: Some(retry_after_s) }
    }
}

/// Names a rule of a server.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct RuleId(usize);

/// Which requests, and what happens to them.
///
/// ```
/// use longshore_storage_server::{Action, At, Operation, Rule};
///
/// // the second request for the header of a file ends in its middle
/// Rule::new(Action::Truncate { at: At::Middle })
///     .operation(Operation::Get)
///     .object("*.safetensors")
///     .bytes(0..8)
///     .skip(1)
///     .times(1);
/// ```
#[derive(Clone, Debug)]
pub struct Rule {
    dialect: Option<Dialect>,
    operation: Option<Operation>,
    object: Option<String>,
    bytes: Option<Range<u64>>,
    skip: u64,
    times: u64,
    share: f64,
    choice: Choice,
}

#[derive(Clone, Debug)]
enum Choice {
    One(Action),
    Script(Vec<Option<Action>>),
    Mixture(Vec<Action>),
}

impl Rule {
    /// An action for every request.
    pub fn new(action: Action) -> Self {
        Self::choosing(Choice::One(action))
    }

    /// The n-th request that matches takes the n-th entry; later ones take none.
    pub fn script(actions: Vec<Option<Action>>) -> Self {
        Self::choosing(Choice::Script(actions))
    }

    /// A share of the requests takes one of the actions each, decided by [`Options::seed`](crate::Options::seed).
    pub fn mixture(share: f64, actions: Vec<Action>) -> Self {
        Self::choosing(Choice::Mixture(actions)).share(share)
    }

    fn choosing(choice: Choice) -> Self {
        Self {
            dialect: None,
            operation: None,
            object: None,
            bytes: None,
            skip: 0,
            times: u64::MAX,
            share: 1.0,
            choice,
        }
    }

    /// Only on one of the ports.
    pub fn dialect(mut self, dialect: Dialect) -> Self {
        self.dialect = Some(dialect);
        self
    }

    /// Only for such requests.
    pub fn operation(mut self, operation: Operation) -> Self {
        self.operation = Some(operation);
        self
    }

    /// Only for objects whose name, or `BUCKET/NAME`, matches; `*` stands for any characters.
    pub fn object(mut self, pattern: &str) -> Self {
        self.object = Some(pattern.to_owned());
        self
    }

    /// Only for requests that ask for at least one of these bytes.
    pub fn bytes(mut self, bytes: Range<u64>) -> Self {
        self.bytes = Some(bytes);
        self
    }

    /// Not for the first so many requests that match.
    pub fn skip(mut self, requests: u64) -> Self {
        self.skip = requests;
        self
    }

    /// For so many requests that match, after those that are skipped.
    pub fn times(mut self, requests: u64) -> Self {
        self.times = requests;
        self
    }

    /// For a share of the requests that are left. Which ones depends on the seed and on what is asked how often, not
    /// on the order in which requests arrive: the same load meets the same faults.
    pub fn share(mut self, share: f64) -> Self {
        self.share = share;
        self
    }

    fn matches(&self, subject: &Subject<'_>) -> bool {
        self.dialect.is_none_or(|dialect| dialect == subject.dialect)
            && self.operation.is_none_or(|operation| operation == subject.operation)
            && self.object.as_ref().is_none_or(|pattern| {
                glob(pattern, subject.object)
                    || glob(pattern, &format!("{}/{}", subject.bucket, subject.object))
            })
            && self.bytes.as_ref().is_none_or(|bytes| {
                let asked = subject.range.clone().unwrap_or(0..0);
                bytes.start < asked.end && asked.start < bytes.end
            })
    }
}

/// Whether `name` matches `pattern`, in which `*` stands for any characters.
fn glob(pattern: &str, name: &str) -> bool {
    let Some((before, after)) = pattern.split_once('*') else { return pattern == name };
    let Some(rest) = name.strip_prefix(before) else { return false };
    (0..=rest.len())
        .filter(|&start| rest.is_char_boundary(start))
        .any(|start| glob(after, &rest[start..]))
}

/// What rules look at.
pub(crate) struct Subject<'a> {
    pub(crate) dialect: Dialect,
    pub(crate) operation: Operation,
    pub(crate) bucket: &'a str,
    pub(crate) object: &'a str,
    /// The bytes of the object that are asked for, where it exists.
    pub(crate) range: Option<Range<u64>>,
}

/// The rules of a server and what became of them.
#[derive(Debug, Default)]
pub(crate) struct Faults {
    seed: u64,
    rules: Vec<(RuleId, Rule, State)>,
    next: usize,
}

#[derive(Debug, Default)]
struct State {
    matched: u64,
    taken: u64,
    /// How often the same has been asked, by the hash of what it is.
    asked: HashMap<u64, u64>,
}

impl Faults {
    pub(crate) fn new(seed: u64) -> Self {
        Self { seed, ..Self::default() }
    }

    pub(crate) fn add(&mut self, rule: Rule) -> RuleId {
        let id = RuleId(self.next);
        self.next += 1;
        self.rules.push((id, rule, State::default()));
        id
    }

    pub(crate) fn remove(&mut self, id: RuleId) {
        self.rules.retain(|(rule, ..)| *rule != id);
    }

    pub(crate) fn clear(&mut self) {
        self.rules.clear();
    }

    /// How often a rule's action was taken.
    pub(crate) fn taken(&self, id: RuleId) -> u64 {
        self.rules.iter().find(|(rule, ..)| *rule == id).map_or(0, |(.., state)| state.taken)
    }

    /// The actions for a request, in the order of the rules.
    pub(crate) fn decide(&mut self, subject: &Subject<'_>) -> Vec<Action> {
        let mut actions = Vec::new();
        for (id, rule, state) in &mut self.rules {
            if !rule.matches(subject) {
                continue;
            }
            let matched = state.matched;
            state.matched += 1;
            if matched < rule.skip || matched - rule.skip >= rule.times {
                continue;
            }
            let action = match &rule.choice {
                Choice::Script(script) => {
                    let index = usize::try_from(matched - rule.skip).unwrap_or(usize::MAX);
                    script.get(index).cloned().flatten()
                }
                Choice::One(_) if rule.share >= 1.0 => rule.chosen(0),
                _ => {
                    let chance = state.chance(self.seed, *id, subject);
                    let unit = (chance >> 11) as f64 / (1u64 << 53) as f64;
                    if unit < rule.share { rule.chosen(mixed(chance)) } else { None }
                }
            };
            if let Some(action) = action {
                state.taken += 1;
                actions.push(action);
            }
        }
        actions
    }
}

impl Rule {
    fn chosen(&self, chance: u64) -> Option<Action> {
        match &self.choice {
            Choice::One(action) => Some(action.clone()),
            Choice::Mixture(actions) if actions.is_empty() => None,
            Choice::Mixture(actions) => {
                let index = chance % actions.len() as u64;
                actions.get(usize::try_from(index).unwrap_or(0)).cloned()
            }
            Choice::Script(_) => None,
        }
    }
}

impl State {
    /// A number that depends on the seed, the rule, what is asked, and how often that was asked before.
    fn chance(&mut self, seed: u64, id: RuleId, subject: &Subject<'_>) -> u64 {
        let mut hasher = DefaultHasher::new();
        (seed, id, subject.operation, subject.bucket, subject.object).hash(&mut hasher);
        subject.range.hash(&mut hasher);
        let what = hasher.finish();
        let times = self.asked.entry(what).or_default();
        *times += 1;
        mixed(what ^ mixed(*times))
    }
}

/// The finaliser of SplitMix64: every bit of the result depends on every bit of the argument.
fn mixed(value: u64) -> u64 {
    let value = value.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ (value >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn subject(object: &str, range: Range<u64>) -> Subject<'_> {
        let (dialect, operation) = (Dialect::S3, Operation::Get);
        Subject { dialect, operation, bucket: "models", object, range: Some(range) }
    }

    #[test]
    fn patterns_match_names_with_and_without_the_bucket() {
        for (pattern, matches) in [
            ("model-*.safetensors", true),
            ("models/*", true),
            ("*", true),
            ("*1*2*", true),
            ("model", false),
            ("*.json", false),
        ] {
            let rule = Rule::new(Action::IgnoredRange).object(pattern);
            assert_eq!(rule.matches(&subject("model-1-of-2.safetensors", 0..1)), matches);
        }
    }

    #[test]
    fn positions_stay_within_the_body() {
        assert_eq!(At::LastByte.resolve(&(10..20)), 9);
        assert_eq!(At::LastByte.resolve(&(10..10)), 0);
        assert_eq!(At::Bytes(30).resolve(&(10..20)), 10);
        assert_eq!(At::Offset(15).resolve(&(10..20)), 5);
        assert_eq!(At::Offset(5).resolve(&(10..20)), 0);
        assert_eq!(At::Offset(50).resolve(&(10..20)), 10);
    }

    #[test]
    fn skipped_and_counted_requests_are_those_that_match() {
        let mut faults = Faults::new(0);
        let rule = Rule::new(Action::IgnoredRange).bytes(5..6).skip(1).times(2);
        let id = faults.add(rule);
        let taken: Vec<usize> = [0..5, 0..6, 5..9, 6..9, 0..10, 5..6]
            .into_iter()
            .map(|range| faults.decide(&subject("a", range)).len())
            .collect();
        assert_eq!(taken, [0, 0, 1, 0, 1, 0]);
        assert_eq!(faults.taken(id), 2);
    }

    #[test]
    fn a_script_is_followed_and_then_over() {
        let mut faults = Faults::new(0);
        faults.add(Rule::script(vec![None, Some(Action::status(500)), Some(Action::status(503))]));
        let taken: Vec<_> = (0..4).map(|_| faults.decide(&subject("a", 0..1))).collect();
        assert_eq!(
            taken,
            [vec![], vec![Action::status(500)], vec![Action::status(503)], Vec::new()]
        );
    }

    /// The same requests meet the same faults, in whatever order they come; another seed gives others.
    #[test]
    fn chance_depends_on_what_is_asked_and_not_on_when() {
        let share = |seed, order: &[u64]| {
            let mut faults = Faults::new(seed);
            faults.add(Rule::mixture(0.25, vec![Action::status(500), Action::status(503)]));
            let mut taken: Vec<_> =
                order.iter().map(|&i| (i, faults.decide(&subject("a", i..i + 1)))).collect();
            taken.sort_by_key(|(i, _)| *i);
            taken.into_iter().map(|(_, actions)| actions).collect::<Vec<_>>()
        };
        let forward: Vec<u64> = (0..1000).collect();
        let backward: Vec<u64> = (0..1000).rev().collect();
        let taken = share(1, &forward);
        assert_eq!(taken, share(1, &backward));
        assert_ne!(taken, share(2, &forward));
        let faults = taken.iter().filter(|actions| !actions.is_empty()).count();
        assert!((200..300).contains(&faults), "{faults}");
        let slow_downs = taken.iter().filter(|actions| **actions == [Action::status(503)]).count();
        assert!((80..170).contains(&slow_downs), "{slow_downs}");
    }
}
