//! What each process is told of its place.

use super::Launch;
use crate::secret::SECRET_VARIABLE;

/// What torchrun sets and `launch` has no use for: a program would look for a store that is not there.
pub(super) const REMOVED: [&str; 1] = ["TORCHELASTIC_USE_AGENT_STORE"];

/// What tells a process how often its rank was started again. torchrun's count is of the whole group, and stays 0 here: a
/// process that joins the others is of the same group as they.
pub(super) const RESTARTS_VARIABLE: &str = "LONGSHORE_RESTARTS";

/// What is the same for all processes of a group.
#[derive(Debug)]
pub(super) struct Shared {
    pub(super) master_addr: String,
    pub(super) master_port: u16,
    pub(super) secret: String,
}

/// Sockets of this host and nothing else. Source: NCCL user guide, "Environment Variables".
const NCCL_ON_ONE_HOST: [(&str, &str); 3] =
    [("NCCL_SOCKET_IFNAME", "lo"), ("NCCL_IB_DISABLE", "1"), ("NCCL_MNNVL_ENABLE", "0")];

impl Launch {
    /// The variables of the process `local_rank` of this host after so many `restarts`; those that
    /// [`Place`](crate::place::Place) reads, under torchrun's names.
    pub(super) fn variables(
        &self,
        local_rank: u32,
        restarts: u32,
        shared: &Shared,
    ) -> Vec<(&'static str, String)> {
        let mut variables = vec![
            ("RANK", self.rank(local_rank).to_string()),
            ("WORLD_SIZE", (self.nnodes * self.nproc).to_string()),
            ("LOCAL_RANK", local_rank.to_string()),
            ("LOCAL_WORLD_SIZE", self.nproc.to_string()),
            ("NODE_RANK", self.node_rank.to_string()),
            ("GROUP_RANK", self.node_rank.to_string()),
            ("GROUP_WORLD_SIZE", self.nnodes.to_string()),
            ("MASTER_ADDR", shared.master_addr.clone()),
            ("MASTER_PORT", shared.master_port.to_string()),
            ("TORCHELASTIC_RESTART_COUNT", "0".to_owned()),
            ("TORCHELASTIC_MAX_RESTARTS", self.max_restarts.to_string()),
            (RESTARTS_VARIABLE, restarts.to_string()),
            (SECRET_VARIABLE, shared.secret.clone()),
        ];
        if self.nccl_hosts {
            let host = format!("longshore-rank-{}", self.rank(local_rank));
            let own = [("NCCL_HOSTID", host.as_str())].into_iter().chain(NCCL_ON_ONE_HOST);
            let unset = own.filter(|(name, _)| std::env::var_os(name).is_none());
            variables.extend(unset.map(|(name, value)| (name, value.to_owned())));
        }
        variables
    }

    /// The rank of the process `local_rank` of this host; hosts hold consecutive ranks.
    pub(super) fn rank(&self, local_rank: u32) -> u32 {
        self.node_rank * self.nproc + local_rank
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{place::Place, secret::Secret};

    /// The two ends of the environment agree.
    #[test]
    fn a_process_finds_the_place_it_was_started_for() {
        let launch = Launch { nnodes: 2, node_rank: 1, ..Launch::new(vec!["true".into()], 4) };
        let (master_addr, secret) = ("10.0.0.1".to_owned(), "abc".to_owned());
        let shared = Shared { master_addr, master_port: 4000, secret };
        let variables = launch.variables(3, 2, &shared);
        let place = Place::from_variables(|name| {
            variables.iter().find(|(known, _)| *known == name).map(|(_, text)| text.clone())
        });
        let wanted = Place::new(7, 8, "10.0.0.1", 4000).unwrap().local_rank(3, 4).unwrap();
        assert_eq!(place.unwrap(), wanted.secret(Secret::from_text("abc")));
    }
}
