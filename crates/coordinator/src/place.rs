//! Where one rank process stands: which rank of how many, and where the first one is met.
//!
//! Whoever starts the processes says so in the environment. torchrun's names count, and those of [`launch`](crate::launch),
//! which are the same; for the three numbers Slurm's are taken where torchrun's are absent:
//!
//! | variable | else | meaning |
//! |---|---|---|
//! | `RANK` | `SLURM_PROCID` | this process among all |
//! | `WORLD_SIZE` | `SLURM_NTASKS` | how many there are |
//! | `LOCAL_RANK` | `SLURM_LOCALID` | this process among those of its host |
//! | `LOCAL_WORLD_SIZE` | unknown | how many are on this host |
//! | `MASTER_ADDR` | | the host of rank 0; not needed when all are on one host |
//! | `MASTER_PORT` | | the first port that is tried there |
//! | `LONGSHORE_PORT` | `MASTER_PORT` | another first port |
//! | `LONGSHORE_BIND` | rank 0's address | the address that rank 0 listens on |
//! | `LONGSHORE_SECRET` | | what the processes know each other by |
//! | `TORCHELASTIC_RESTART_COUNT` | 0 | how often the group was started again |
//!
//! **Source:** torchrun's variables: `torch/distributed/run.py`, "Environment Variables"; Slurm's: `man srun`, "OUTPUT
//! ENVIRONMENT VARIABLES".

use std::{
    fmt::Display,
    io,
    net::{IpAddr, Ipv4Addr, SocketAddr, ToSocketAddrs},
    ops::RangeInclusive,
    str::FromStr,
};

use crate::{
    error::LoadError,
    secret::{SECRET_VARIABLE, Secret},
};

/// How many ports are tried, from the first on: the one that was agreed on may be taken by the program around the ranks.
pub const PORT_CANDIDATES: u16 = 4;

/// Where one rank process stands.
///
/// ```
/// use longshore::place::Place;
///
/// let place = Place::new(1, 4, "10.0.0.1", 29500)?;
/// assert_eq!(place.candidates().unwrap()[0], "10.0.0.1:29500".parse().unwrap());
/// # Ok::<(), longshore::error::LoadError>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Place {
    /// This process among all.
    pub rank: u32,
    /// How many processes there are.
    pub world_size: u32,
    /// This process among those of its host; a rank's device follows from it.
    pub local_rank: u32,
    /// How many processes are on this host, where that is known.
    pub local_world_size: Option<u32>,
    /// The host of rank 0.
    pub master: String,
    /// The ports that are tried there, in order.
    pub ports: RangeInclusive<u16>,
    /// The address that rank 0 listens on, where it is not `master`'s.
    pub bind: Option<String>,
    /// What the processes know each other by.
    pub secret: Option<Secret>,
    /// How often the group was started again.
    pub attempt: u32,
}

impl Place {
    /// The place of `rank` among `world_size`, with rank 0 on host `master` at `port` or one of the ports after it.
    ///
    /// # Errors
    /// `world_size` is 0, or `rank` is not below it.
    pub fn new(rank: u32, world_size: u32, master: &str, port: u16) -> Result<Self, LoadError> {
        if world_size == 0 {
            return Err(unexpected("WORLD_SIZE", &world_size, "at least 1"));
        }
        below("RANK", rank, "WORLD_SIZE", world_size)?;
        Ok(Self {
            rank,
            world_size,
            local_rank: rank,
            local_world_size: None,
            master: bare_host(master),
            ports: ports_from(port),
            bind: None,
            secret: None,
            attempt: 0,
        })
    }

    /// With what the processes know each other by.
    pub fn secret(self, secret: Secret) -> Self {
        Self { secret: Some(secret), ..self }
    }

    /// With its place among the `local_world_size` processes of its host.
    ///
    /// # Errors
    /// `local_rank` is not below `local_world_size`, or that is more than there are in all.
    pub fn local_rank(self, local_rank: u32, local_world_size: u32) -> Result<Self, LoadError> {
        below("LOCAL_RANK", local_rank, "LOCAL_WORLD_SIZE", local_world_size)?;
        if local_world_size > self.world_size {
            let most = format!("at most WORLD_SIZE, which is {}", self.world_size);
            return Err(unexpected("LOCAL_WORLD_SIZE", &local_world_size, &most));
        }
        Ok(Self { local_rank, local_world_size: Some(local_world_size), ..self })
    }

    /// With another address for rank 0 to listen on, `0.0.0.0` for instance.
    pub fn bind(self, address: &str) -> Self {
        Self { bind: Some(bare_host(address)), ..self }
    }

    /// The place that this process's environment gives it.
    ///
    /// # Errors
    /// A variable is missing or cannot be understood.
    pub fn from_env() -> Result<Self, LoadError> {
        Self::from_variables(|name| Some(std::env::var_os(name)?.to_string_lossy().into_owned()))
    }

    /// The place that `variable` tells of; one that is empty counts as absent.
    ///
    /// # Errors
    /// A variable is missing or cannot be understood.
    pub fn from_variables(variable: impl Fn(&str) -> Option<String>) -> Result<Self, LoadError> {
        let variables = Variables(|name: &str| {
            variable(name).map(|text| text.trim().to_owned()).filter(|text| !text.is_empty())
        });
        let rank = variables.required("RANK", Some("SLURM_PROCID"))?;
        let world_size = variables.required("WORLD_SIZE", Some("SLURM_NTASKS"))?;
        let local_rank = variables.required("LOCAL_RANK", Some("SLURM_LOCALID"))?;
        let local_world_size = variables.number("LOCAL_WORLD_SIZE")?;
        let one_host = on_one_host(world_size, local_world_size);
        let master = match variables.text("MASTER_ADDR") {
            Some(host) => host,
            None if one_host => Ipv4Addr::LOCALHOST.to_string(),
            None => return Err(missing("MASTER_ADDR", "the host of rank 0")),
        };
        let place = Self {
            ports: variables.ports()?,
            bind: variables.text("LONGSHORE_BIND").as_deref().map(bare_host),
            secret: variables.text(SECRET_VARIABLE).as_deref().map(Secret::from_text),
            attempt: variables.number("TORCHELASTIC_RESTART_COUNT")?.unwrap_or(0),
            local_rank,
            ..Self::new(rank, world_size, &master, 0)?
        };
        match local_world_size {
            Some(count) => place.local_rank(local_rank, count),
            None => Ok(place),
        }
    }

    /// Whether every rank is on this host; they then meet on the loopback address, whatever the environment says of others.
    pub fn one_host(&self) -> bool {
        on_one_host(self.world_size, self.local_world_size)
    }

    /// Where rank 0 may be met, in the order to try.
    ///
    /// # Errors
    /// The host of rank 0 has no address.
    pub fn candidates(&self) -> io::Result<Vec<SocketAddr>> {
        match self.one_host() {
            true => self.on_ports_of(&Ipv4Addr::LOCALHOST.to_string()),
            false => self.on_ports_of(&self.master),
        }
    }

    /// Where rank 0 may listen, in the order to try.
    ///
    /// # Errors
    /// The address to listen on cannot be resolved.
    pub fn listen_candidates(&self) -> io::Result<Vec<SocketAddr>> {
        match &self.bind {
            // an open door is of no use to ranks that all come by the loopback address
            Some(address) if !self.one_host() => self.on_ports_of(address),
            _ => self.candidates(),
        }
    }

    /// All addresses of `host` on the first port, then all on the second …
    fn on_ports_of(&self, host: &str) -> io::Result<Vec<SocketAddr>> {
        let mut addresses: Vec<IpAddr> = Vec::new();
        for found in (host, 0).to_socket_addrs()? {
            if !addresses.contains(&found.ip()) {
                addresses.push(found.ip());
            }
        }
        let on = |port| addresses.iter().map(move |address| SocketAddr::new(*address, port));
        Ok(self.ports.clone().flat_map(on).collect())
    }
}

/// Variables by name, the empty ones left out.
struct Variables<F>(F);

impl<F: Fn(&str) -> Option<String>> Variables<F> {
    fn text(&self, name: &str) -> Option<String> {
        (self.0)(name)
    }

    fn number<T: FromStr>(&self, name: &'static str) -> Result<Option<T>, LoadError> {
        let Some(text) = self.text(name) else { return Ok(None) };
        text.parse().map(Some).map_err(|_| unexpected(name, &text, "a number"))
    }

    fn required(&self, name: &'static str, slurm: Option<&'static str>) -> Result<u32, LoadError> {
        let names = [Some(name), slurm].into_iter().flatten();
        for name in names {
            if let Some(number) = self.number(name)? {
                return Ok(number);
            }
        }
        Err(missing(name, "a number, as torchrun, srun and longshore launch set it"))
    }

    fn port(&self, name: &'static str) -> Result<Option<u16>, LoadError> {
        let Some(text) = self.text(name) else { return Ok(None) };
        match text.parse() {
            Ok(port @ 1..) => Ok(Some(port)),
            _ => Err(unexpected(name, &text, "a port from 1 to 65535")),
        }
    }

    fn ports(&self) -> Result<RangeInclusive<u16>, LoadError> {
        if let Some(port) = self.port("LONGSHORE_PORT")? {
            return Ok(ports_from(port));
        }
        let Some(port) = self.port("MASTER_PORT")? else {
            return Err(missing("MASTER_PORT", "a port from 1 to 65535 of rank 0's host"));
        };
        let store = self.text("TORCHELASTIC_USE_AGENT_STORE");
        Ok(match store.is_some_and(|said| said.eq_ignore_ascii_case("true")) {
            true => ports_beside(port),
            false => ports_from(port),
        })
    }
}

fn on_one_host(world_size: u32, local_world_size: Option<u32>) -> bool {
    world_size == 1 || local_world_size == Some(world_size)
}

/// `port` and those after it, as far as there are any.
fn ports_from(port: u16) -> RangeInclusive<u16> {
    port..=port.saturating_add(PORT_CANDIDATES - 1)
}

/// The ports after `taken`, which is torchrun's own; before it, where it is the last of all.
fn ports_beside(taken: u16) -> RangeInclusive<u16> {
    match taken.checked_add(1) {
        Some(port) => ports_from(port),
        None => taken - PORT_CANDIDATES..=taken - 1,
    }
}

/// `[::1]` is `::1`: the brackets only part an address from its port.
fn bare_host(host: &str) -> String {
    let host = host.trim();
    host.strip_prefix('[').and_then(|h| h.strip_suffix(']')).unwrap_or(host).to_owned()
}

fn below(name: &'static str, number: u32, limit_name: &str, limit: u32) -> Result<(), LoadError> {
    match number < limit {
        true => Ok(()),
        false => {
            Err(unexpected(name, &number, &format!("less than {limit_name}, which is {limit}")))
        }
    }
}

fn unexpected(option: &'static str, found: &dyn Display, expected: &str) -> LoadError {
    LoadError::Option { option, reason: format!("expected {expected}, found {found}") }
}

fn missing(option: &'static str, expected: &str) -> LoadError {
    LoadError::Option { option, reason: format!("expected {expected}; it is not set") }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TORCHRUN: [(&str, &str); 6] = [
        ("RANK", "5"),
        ("WORLD_SIZE", "8"),
        ("LOCAL_RANK", "1"),
        ("LOCAL_WORLD_SIZE", "4"),
        ("MASTER_ADDR", "10.0.0.1"),
        ("MASTER_PORT", "29500"),
    ];

    /// torchrun's variables with some replaced; empty ones count as absent.
    fn place(changes: &[(&str, &str)]) -> Result<Place, LoadError> {
        Place::from_variables(|name| {
            let mut all = changes.iter().chain(&TORCHRUN);
            all.find(|(known, _)| *known == name).map(|(_, text)| (*text).to_owned())
        })
    }

    fn complaint(changes: &[(&str, &str)]) -> String {
        let error = place(changes).unwrap_err();
        assert_eq!(error.exit_code(), 2);
        error.line()
    }

    fn addresses(of: io::Result<Vec<SocketAddr>>) -> Vec<String> {
        of.unwrap().iter().map(SocketAddr::to_string).collect()
    }

    #[test]
    fn torchruns_variables_give_a_place() {
        let place = place(&[("LONGSHORE_SECRET", "abc"), ("TORCHELASTIC_RESTART_COUNT", "2")]);
        let place = place.unwrap();
        assert_eq!((place.rank, place.world_size, place.local_rank), (5, 8, 1));
        assert_eq!((place.local_world_size, place.attempt), (Some(4), 2));
        assert_eq!(place.secret, Some(Secret::from_text("abc")));
        let wanted: Vec<String> = (29500..29504).map(|port| format!("10.0.0.1:{port}")).collect();
        assert_eq!(addresses(place.candidates()), wanted);
        assert_eq!(addresses(place.listen_candidates()), wanted);
    }

    #[test]
    fn slurms_numbers_count_where_torchruns_are_absent_and_its_addresses_never() {
        let slurm = [
            ("RANK", ""),
            ("WORLD_SIZE", ""),
            ("LOCAL_RANK", ""),
            ("LOCAL_WORLD_SIZE", ""),
            ("SLURM_PROCID", "3"),
            ("SLURM_NTASKS", "4"),
            ("SLURM_LOCALID", "0"),
            ("SLURM_LAUNCH_NODE_IPADDR", "10.0.0.9"),
        ];
        let found = place(&slurm).unwrap();
        assert_eq!((found.rank, found.world_size, found.local_rank), (3, 4, 0));
        assert_eq!((found.local_world_size, found.one_host()), (None, false));
        assert!(complaint(&[&slurm[..], &[("MASTER_ADDR", "")]].concat()).contains("MASTER_ADDR"));
    }

    /// torchrun's own store holds the port that it announces.
    #[test]
    fn ports_start_after_torchruns_store_and_end_with_the_last_one() {
        let ports = |changes: &[(&str, &str)]| place(changes).unwrap().ports;
        let store = ("TORCHELASTIC_USE_AGENT_STORE", "True");
        assert_eq!(ports(&[]), 29500..=29503);
        assert_eq!(ports(&[store]), 29501..=29504);
        assert_eq!(ports(&[("TORCHELASTIC_USE_AGENT_STORE", "False")]), 29500..=29503);
        assert_eq!(ports(&[store, ("LONGSHORE_PORT", "4000")]), 4000..=4003);
        assert_eq!(ports(&[("LONGSHORE_PORT", "4000"), ("MASTER_PORT", "")]), 4000..=4003);
        assert_eq!(ports(&[("MASTER_PORT", "65534")]), 65534..=65535);
        assert_eq!(ports(&[store, ("MASTER_PORT", "65534")]), 65535..=65535);
        assert_eq!(ports(&[store, ("MASTER_PORT", "65535")]), 65531..=65534);
    }

    #[test]
    fn ranks_of_one_host_meet_on_the_loopback_address() {
        let bound = ("LONGSHORE_BIND", "0.0.0.0");
        let alone = [("LOCAL_WORLD_SIZE", "8"), ("MASTER_ADDR", "no.such.host.invalid"), bound];
        let found = place(&alone).unwrap();
        assert_eq!(addresses(found.candidates())[0], "127.0.0.1:29500");
        assert_eq!(addresses(found.listen_candidates())[0], "127.0.0.1:29500");
        assert!(place(&[("LOCAL_WORLD_SIZE", "8"), ("MASTER_ADDR", "")]).unwrap().one_host());

        let found = place(&[bound]).unwrap();
        assert_eq!(addresses(found.candidates())[0], "10.0.0.1:29500");
        assert_eq!(addresses(found.listen_candidates())[0], "0.0.0.0:29500");
    }

    #[test]
    fn addresses_of_both_kinds_are_understood() {
        let place = Place::new(0, 2, "[::1]", 4000).unwrap().bind("[::]");
        assert_eq!(addresses(place.candidates())[..2], ["[::1]:4000", "[::1]:4001"]);
        assert_eq!(addresses(place.listen_candidates())[0], "[::]:4000");
    }

    #[test]
    fn a_variable_that_cannot_be_meant_is_named_with_what_it_says() {
        for (changes, words) in [
            (&[("RANK", "")][..], &["RANK", "not set"][..]),
            (&[("RANK", "-1")], &["RANK", "-1"]),
            (&[("RANK", "8")], &["RANK", "found 8", "WORLD_SIZE", "is 8"]),
            (&[("WORLD_SIZE", "0")], &["WORLD_SIZE", "at least 1", "found 0"]),
            (&[("WORLD_SIZE", "many")], &["WORLD_SIZE", "many"]),
            (&[("LOCAL_RANK", "4")], &["LOCAL_RANK", "found 4"]),
            (&[("LOCAL_WORLD_SIZE", "9")], &["LOCAL_WORLD_SIZE", "found 9", "is 8"]),
            (&[("MASTER_ADDR", "")], &["MASTER_ADDR", "not set"]),
            (&[("MASTER_PORT", "")], &["MASTER_PORT", "not set"]),
            (&[("MASTER_PORT", "0")], &["MASTER_PORT", "found 0"]),
            (&[("LONGSHORE_PORT", "65536")], &["LONGSHORE_PORT", "found 65536"]),
            (&[("TORCHELASTIC_RESTART_COUNT", "x")], &["TORCHELASTIC_RESTART_COUNT", "found x"]),
        ] {
            let line = complaint(changes);
            for word in words {
                assert!(line.contains(word), "{changes:?}: {line}");
            }
        }
        assert!(Place::new(0, 2, "a", 1).unwrap().local_rank(1, 3).is_err());
    }
}
