//! Which server to talk to, without I/O: the configured addresses and those
//! that the cluster advertises, with a preference for the leader.
//!
//! Any server can answer; the leader saves a hop. So a hint about the leader
//! is followed unless that address has just failed, and after a failure the
//! next address gets its turn.

use std::{collections::BTreeMap, net::Ipv6Addr};

use crate::{error::Error, session_state::Micros};

/// How long after the first failure of an address hints to it are ignored. It
/// doubles with each failure in a row: an advertised address may never be
/// reachable from here.
const DISTRUST: Micros = 1_000_000;
const DISTRUST_DOUBLINGS_MAX: u32 = 6;
/// Addresses kept in all, so that odd hints cannot grow the list for ever.
const ADDRESSES_MAX: usize = 64;
/// The longest host name there is.
const HOST_BYTES_MAX: usize = 253;
/// The port of servers that are given without one.
const DEFAULT_PORT: u16 = 2379;

/// The known servers.
#[derive(Debug)]
pub(crate) struct Routes {
    servers: Vec<Server>,
    current: usize,
    /// Where a member can be reached, as far as it has been learned.
    members: BTreeMap<u64, usize>,
}

#[derive(Debug)]
struct Server {
    address: String,
    /// Failures in a row, counted once a period of distrust.
    failures: u32,
    distrusted_until: Micros,
}

impl Routes {
    /// Routes to these addresses, each as [`normalize`] gives them; the first
    /// is tried first. Not empty.
    pub(crate) fn new(addresses: Vec<String>) -> Routes {
        assert!(!addresses.is_empty(), "there is at least one address");
        let mut routes = Routes {
            servers: Vec::new(),
            current: 0,
            members: BTreeMap::new(),
        };
        for address in addresses {
            routes.index_of(address);
        }
        routes
    }

    /// The server to use now.
    pub(crate) fn current(&self) -> usize {
        self.current
    }

    /// Every known address, in a stable order: positions never change.
    pub(crate) fn addresses(&self) -> impl ExactSizeIterator<Item = &str> {
        self.servers.iter().map(|server| server.address.as_str())
    }

    /// The server at `index` could not be reached or did not answer. Moves on
    /// to the next, unless others have moved on already. Whether the current
    /// server is now another than `index`.
    pub(crate) fn failed(&mut self, index: usize, now: Micros) -> bool {
        if self.is_trusted(index, now) {
            let server = &mut self.servers[index];
            server.distrusted_until = now + (DISTRUST << server.failures);
            server.failures = (server.failures + 1).min(DISTRUST_DOUBLINGS_MAX);
        }
        self.pass_over(index, now)
    }

    /// The server at `index` is well, but cannot do this now. Moves on as
    /// [`Routes::failed`] does.
    pub(crate) fn pass_over(&mut self, index: usize, now: Micros) -> bool {
        if self.current == index {
            let count = self.servers.len();
            let next = (1..count)
                .map(|step| (index + step) % count)
                .find(|candidate| self.is_trusted(*candidate, now));
            self.current = next.unwrap_or((index + 1) % count);
        }
        self.current != index
    }

    /// The server at `index`, which is this member, answered.
    pub(crate) fn answered(&mut self, index: usize, member: u64) {
        self.servers[index].failures = 0;
        self.servers[index].distrusted_until = 0;
        self.members.insert(member, index);
    }

    /// The leader serves at this address. Whether that is the current server
    /// now.
    pub(crate) fn prefer(&mut self, address: &str, now: Micros) -> bool {
        let Ok(address) = normalize(address) else {
            return false;
        };
        let Some(index) = self.index_of(address) else {
            return false;
        };
        self.prefer_index(index, now)
    }

    /// This member leads. `None`: it is not known where it serves.
    pub(crate) fn prefer_member(&mut self, member: u64, now: Micros) -> Option<bool> {
        let index = *self.members.get(&member)?;
        Some(self.prefer_index(index, now))
    }

    /// Notes where a member serves: at the first of its addresses that is
    /// known already, else at the first.
    pub(crate) fn learn(&mut self, member: u64, urls: &[String]) {
        let urls: Vec<String> = urls.iter().filter_map(|url| normalize(url).ok()).collect();
        let known = urls.iter().find(|url| self.position(url).is_some());
        if let Some(address) = known.or_else(|| urls.first()).cloned()
            && let Some(index) = self.index_of(address)
        {
            self.members.insert(member, index);
        }
    }

    fn prefer_index(&mut self, index: usize, now: Micros) -> bool {
        if index != self.current && self.is_trusted(index, now) {
            self.current = index;
        }
        self.current == index
    }

    fn is_trusted(&self, index: usize, now: Micros) -> bool {
        now >= self.servers[index].distrusted_until
    }

    fn position(&self, address: &str) -> Option<usize> {
        self.servers
            .iter()
            .position(|server| server.address == address)
    }

    fn index_of(&mut self, address: String) -> Option<usize> {
        let known = self.position(&address);
        if known.is_none() && self.servers.len() < ADDRESSES_MAX {
            self.servers.push(Server {
                address,
                failures: 0,
                distrusted_until: 0,
            });
            return Some(self.servers.len() - 1);
        }
        known
    }
}

/// `host:port` of an address as people write it: with or without `http://`,
/// and port 2379 unless another is given.
pub(crate) fn normalize(address: &str) -> Result<String, Error> {
    let invalid = |problem: &'static str| Error::InvalidEndpoint {
        endpoint: address.to_owned(),
        problem,
    };
    let trimmed = address.trim();
    if trimmed.starts_with("https://") {
        return Err(invalid("TLS is not supported yet"));
    }
    let rest = trimmed.strip_prefix("http://").unwrap_or(trimmed);
    let rest = rest.strip_suffix('/').unwrap_or(rest);
    if rest.contains("://") {
        return Err(invalid("the scheme must be http"));
    }
    let bare_v6 = rest.starts_with('[') && rest.ends_with(']');
    let (host, port) = match rest.rsplit_once(':') {
        Some((host, port)) if !bare_v6 => (
            host,
            port.parse()
                .map_err(|_| invalid("the port is not a number up to 65535"))?,
        ),
        _ => (rest, DEFAULT_PORT),
    };
    let v6 = host
        .strip_prefix('[')
        .and_then(|host| host.strip_suffix(']'));
    let is_v6 = v6.is_some_and(|host| host.parse::<Ipv6Addr>().is_ok());
    let is_name = (1..=HOST_BYTES_MAX).contains(&host.len())
        && host
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'-' | b'_'));
    if !is_v6 && !is_name {
        return Err(invalid("the host is neither a name nor an IP address"));
    }
    Ok(format!("{host}:{port}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn three() -> Routes {
        Routes::new(["a:1", "b:1", "c:1"].map(str::to_owned).to_vec())
    }

    #[test]
    fn addresses_as_people_write_them() {
        let good = [
            ("127.0.0.1:2379", "127.0.0.1:2379"),
            ("http://node-1:22379/", "node-1:22379"),
            (" example.org", "example.org:2379"),
            ("[::1]:99", "[::1]:99"),
            ("[::1]", "[::1]:2379"),
        ];
        for (written, meant) in good {
            assert_eq!(normalize(written).unwrap(), meant);
        }
        for bad in [
            "",
            "https://a",
            "ftp://a",
            "a:b",
            "a:70000",
            "a/b",
            "::1",
            "a b",
            ":1",
            "[a]:1",
        ] {
            assert!(normalize(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_failure_moves_on_to_the_next_trusted_server_once() {
        let mut routes = three();
        assert!(routes.failed(0, 10));
        assert_eq!(routes.current(), 1);
        routes.failed(0, 11);
        assert_eq!(
            routes.current(),
            1,
            "a second failure of the same server moves nobody"
        );
        routes.failed(1, 12);
        routes.failed(2, 13);
        assert_eq!(routes.current(), 0, "all have failed: go round");
    }

    #[test]
    fn one_server_alone_stays() {
        let mut routes = Routes::new(vec!["a:1".to_owned()]);
        assert!(!routes.failed(0, 1));
        assert_eq!(routes.current(), 0);
    }

    #[test]
    fn the_leader_is_preferred_unless_it_has_just_failed() {
        let mut routes = three();
        assert!(routes.prefer("http://b:1", 0));
        assert_eq!(routes.current(), 1);
        routes.failed(1, 0);
        assert!(!routes.prefer("b:1", 10));
        assert!(routes.prefer("b:1", DISTRUST));
        routes.failed(1, DISTRUST);
        assert!(
            !routes.prefer("b:1", DISTRUST + DISTRUST),
            "distrust has doubled"
        );
        routes.answered(1, 5);
        assert!(routes.prefer("b:1", DISTRUST + 10));
    }

    #[test]
    fn members_are_found_at_configured_addresses_first() {
        let mut routes = three();
        routes.learn(
            7,
            &["http://advertised:1".to_owned(), "http://c:1".to_owned()],
        );
        assert_eq!(routes.prefer_member(7, 0), Some(true));
        assert_eq!(routes.current(), 2);
        routes.learn(8, &["http://advertised:1".to_owned()]);
        assert_eq!(routes.prefer_member(8, 0), Some(true));
        assert_eq!(routes.addresses().nth(3), Some("advertised:1"));
        assert_eq!(routes.prefer_member(9, 0), None);
    }
}
