//! `conclave dev`: a cluster of real server processes on this machine.
//!
//! The servers are this binary again. Each has a pipe from here as its stdin
//! and stops when that closes, so that none outlives this process however it
//! ends.

use std::{
    collections::BTreeSet,
    env,
    ffi::OsString,
    fs::{self, File},
    io,
    net::{Ipv4Addr, TcpListener},
    path::{Path, PathBuf},
    process::Stdio,
    time::Duration,
};

use rustix::process::{Pid, Signal, kill_process};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    process::{Child, ChildStdin, Command},
    task::JoinSet,
    time::{Instant, sleep, sleep_until, timeout},
};

use crate::{
    cli::DevArgs,
    failure::{Failure, GENERAL, USAGE},
    output,
    process::{Signals, command, exit_code, not_started, signal_code},
};

/// From server to server, the ports for clients grow by this; the first step
/// is twice as long, so that the well-known ports of others stay free.
const PORT_STEP: u32 = 10_000;
/// How long the servers may take to be ready.
const READY: Duration = Duration::from_secs(30);
/// How often they are asked meanwhile.
const READY_PAUSE: Duration = Duration::from_millis(20);
/// How often to look whether a server has ended by itself.
const LOOK: Duration = Duration::from_millis(100);
/// How long a server may take to stop before it is killed.
const STOP: Duration = Duration::from_secs(5);
/// What is shown of the log of a server that failed.
const LOG_TAIL_LINES: usize = 10;

/// Where one server listens and keeps its things.
#[derive(Clone, Debug)]
struct Plan {
    name: String,
    client: String,
    peer: String,
    data_dir: PathBuf,
    log: PathBuf,
}

/// A server that was started.
#[derive(Debug)]
struct Server {
    plan: Plan,
    child: Child,
    /// Keeps it running. Apart from `child`, which would close it when waited
    /// for.
    _lifeline: Option<ChildStdin>,
    has_ended: bool,
}

/// The directory of the cluster; removed at the end if nobody asked for it.
#[derive(Debug)]
struct Directory {
    path: PathBuf,
    is_temporary: bool,
}

/// Starts the cluster, runs the command or waits for the end, and stops it.
pub(crate) async fn run(args: DevArgs) -> Result<u8, Failure> {
    let mut signals = Signals::new()?;
    let ports = ports(args.port, args.nodes)?;
    check_free(&ports)?;
    let directory = Directory::new(args.data_dir.as_deref())?;
    let plans: Vec<Plan> = (1..)
        .zip(ports)
        .map(|(n, port)| directory.plan(n, port))
        .collect();
    let mut servers = Vec::new();
    let outcome = match start_all(&plans, &mut servers) {
        Ok(()) => use_cluster(&mut servers, &args.command, &mut signals).await,
        Err(failure) => Err(failure),
    };
    stop_all(servers).await;
    outcome
}

async fn use_cluster(
    servers: &mut [Server],
    command: &[OsString],
    signals: &mut Signals,
) -> Result<u8, Failure> {
    tokio::select! {
        ready = ready(servers) => ready?,
        signal = signals.end() => return Ok(signal_code(signal.as_raw())),
    }
    let endpoints: Vec<&str> = servers
        .iter()
        .map(|server| server.plan.client.as_str())
        .collect();
    let endpoints = endpoints.join(",");
    output::text(&format!("ready endpoints={endpoints}\n"))?;
    if !command.is_empty() {
        return run_command(command, &endpoints, signals).await;
    }
    output::text(&hints(servers, &endpoints))?;
    tokio::select! {
        () = watch(servers) => Err(Failure::new(GENERAL, "all servers have ended")),
        _ = signals.end() => Ok(0),
    }
}

/// The ports for clients; the one above each is for peers.
fn ports(first: u16, nodes: u16) -> Result<Vec<u16>, Failure> {
    let offset = |n: u32| if n == 0 { 0 } else { (n + 1) * PORT_STEP };
    let ports: Vec<u32> = (0..u32::from(nodes))
        .map(|n| u32::from(first) + offset(n))
        .collect();
    let highest = u32::from(first) + offset(u32::from(nodes) - 1) + 1;
    let room = u32::from(u16::MAX);
    if highest > room {
        let most = room
            .checked_sub(offset(u32::from(nodes) - 1) + 1)
            .filter(|most| *most > 0);
        let advice = match most {
            Some(most) => format!("--port may be at most {most}"),
            None => "there are not enough ports for so many".to_owned(),
        };
        let message =
            format!("{nodes} servers from port {first} on would need port {highest}: {advice}");
        return Err(Failure::new(USAGE, message));
    }
    Ok(ports
        .into_iter()
        .filter_map(|port| u16::try_from(port).ok())
        .collect())
}

/// A port that is taken would be noticed by a server too, but later: until
/// then, whoever has it may answer in its place and look ready.
fn check_free(ports: &[u16]) -> Result<(), Failure> {
    for port in ports.iter().flat_map(|port| [*port, port + 1]) {
        TcpListener::bind((Ipv4Addr::LOCALHOST, port)).map_err(|error| {
            let advice = "choose others with --port";
            Failure::new(
                GENERAL,
                format!("cannot use port {port}: {error}; {advice}"),
            )
        })?;
    }
    Ok(())
}

impl Directory {
    fn new(given: Option<&Path>) -> io::Result<Directory> {
        let is_temporary = given.is_none();
        let path = match given {
            Some(path) => path.to_owned(),
            None => env::temp_dir().join(format!("conclave-dev-{}", std::process::id())),
        };
        fs::create_dir_all(&path)?;
        Ok(Directory { path, is_temporary })
    }

    fn plan(&self, number: usize, port: u16) -> Plan {
        let name = format!("node{number}");
        Plan {
            client: format!("127.0.0.1:{port}"),
            peer: format!("127.0.0.1:{}", port + 1),
            data_dir: self.path.join(&name),
            log: self.path.join(format!("{name}.log")),
            name,
        }
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        if self.is_temporary
            && let Err(error) = fs::remove_dir_all(&self.path)
        {
            output::complain(&format!("cannot remove {}: {error}", self.path.display()));
        }
    }
}

fn start_all(plans: &[Plan], servers: &mut Vec<Server>) -> Result<(), Failure> {
    let members: Vec<String> = plans
        .iter()
        .map(|plan| format!("{}=http://{}", plan.name, plan.peer))
        .collect();
    let members = members.join(",");
    for plan in plans {
        servers.push(start(plan, &members)?);
    }
    Ok(())
}

fn start(plan: &Plan, members: &str) -> Result<Server, Failure> {
    let log = File::options().create(true).append(true).open(&plan.log)?;
    let mut child = Command::new(env::current_exe()?)
        .arg("serve")
        .args(["--name", &plan.name])
        .arg("--data-dir")
        .arg(&plan.data_dir)
        .args(["--listen-client-urls", &format!("http://{}", plan.client)])
        .args([
            "--advertise-client-urls",
            &format!("http://{}", plan.client),
        ])
        .args(["--listen-peer-urls", &format!("http://{}", plan.peer)])
        .args([
            "--initial-advertise-peer-urls",
            &format!("http://{}", plan.peer),
        ])
        .args(["--initial-cluster", members])
        .arg("--stop-on-stdin-eof")
        // Ctrl-C is for this process, which stops them in order.
        .process_group(0)
        .stdin(Stdio::piped())
        .stdout(log.try_clone()?)
        .stderr(log)
        .spawn()?;
    Ok(Server {
        plan: plan.clone(),
        _lifeline: child.stdin.take(),
        child,
        has_ended: false,
    })
}

/// Waits until every server serves linearizable reads. One that ends before is
/// an error, whichever it is.
async fn ready(servers: &mut [Server]) -> Result<(), Failure> {
    let mut asked = JoinSet::new();
    for (n, server) in servers.iter().enumerate() {
        let address = server.plan.client.clone();
        asked.spawn(async move {
            until_ready(&address).await;
            n
        });
    }
    let mut waiting: BTreeSet<usize> = (0..servers.len()).collect();
    let deadline = Instant::now() + READY;
    while let Some(first) = waiting.first() {
        tokio::select! {
            Some(Ok(ready)) = asked.join_next() => {
                waiting.remove(&ready);
            }
            () = sleep(LOOK) => none_has_ended(servers)?,
            () = sleep_until(deadline) => {
                return Err(not_ready(&servers[*first].plan, "is not ready in time"));
            }
        }
    }
    Ok(())
}

fn none_has_ended(servers: &mut [Server]) -> Result<(), Failure> {
    for Server {
        plan,
        child,
        has_ended,
        ..
    } in servers
    {
        if let Some(status) = child.try_wait()? {
            *has_ended = true;
            return Err(not_ready(plan, &format!("ended: {status}")));
        }
    }
    Ok(())
}

async fn until_ready(address: &str) {
    while !matches!(
        timeout(READY_PAUSE * 50, is_ready(address)).await,
        Ok(Ok(true))
    ) {
        sleep(READY_PAUSE).await;
    }
}

async fn is_ready(address: &str) -> io::Result<bool> {
    let mut stream = TcpStream::connect(address).await?;
    let request = format!("GET /readyz HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).await?;
    Ok(answer.starts_with(b"HTTP/1.1 200"))
}

fn not_ready(plan: &Plan, what: &str) -> Failure {
    let log = fs::read(&plan.log).unwrap_or_default();
    let log = String::from_utf8_lossy(&log);
    let lines: Vec<&str> = log.lines().collect();
    let tail = lines[lines.len().saturating_sub(LOG_TAIL_LINES)..].join("\n");
    Failure::new(
        GENERAL,
        format!("server {} {what}; its log ends with:\n{tail}", plan.name),
    )
}

fn hints(servers: &[Server], endpoints: &str) -> String {
    let mut text = format!(
        "\nIn another terminal:\n  export CONCLAVE_ENDPOINTS={endpoints}\n  \
         conclave lock demo -- sleep 30     hold a lock while a command runs\n  \
         conclave lock demo --try -- true   be refused meanwhile\n  \
         conclave locks                     see who holds, and who waits\n  \
         conclave status                    see who leads\n"
    );
    for server in servers {
        if let Some(id) = server.child.id() {
            text.push_str(&format!("  kill -9 {id:<26} lose {}\n", server.plan.name));
        }
    }
    text.push_str("\nCtrl-C stops the cluster.\n");
    text
}

/// Reports servers that end, until all have.
async fn watch(servers: &mut [Server]) {
    let mut running = servers.len();
    while running > 0 {
        for server in servers.iter_mut().filter(|server| !server.has_ended) {
            if let Ok(Some(status)) = server.child.try_wait() {
                server.has_ended = true;
                running -= 1;
                output::complain(&format!("server {} ended: {status}", server.plan.name));
            }
        }
        sleep(LOOK).await;
    }
}

/// Runs the command with the cluster in its environment.
async fn run_command(
    words: &[OsString],
    endpoints: &str,
    signals: &mut Signals,
) -> Result<u8, Failure> {
    let mut child = command(words)
        .env("CONCLAVE_ENDPOINTS", endpoints)
        .env("PATH", path_with_this_binary()?)
        .spawn()
        .map_err(|error| not_started(&words[0], &error))?;
    loop {
        tokio::select! {
            status = child.wait() => return Ok(exit_code(status?)),
            signal = signals.next() => {
                // From a terminal the command has got these by itself.
                let is_from_terminal = signal == Signal::INT || signal == Signal::QUIT;
                if !is_from_terminal {
                    signal_child(&child, signal);
                }
            }
        }
    }
}

fn path_with_this_binary() -> Result<OsString, Failure> {
    let exe = env::current_exe()?;
    let own = exe.parent().map(Path::to_owned);
    let path = env::var_os("PATH").unwrap_or_default();
    env::join_paths(own.into_iter().chain(env::split_paths(&path)))
        .map_err(|error| Failure::new(GENERAL, format!("cannot extend PATH: {error}")))
}

/// Stops all servers: in good order if they can, else by force.
async fn stop_all(servers: Vec<Server>) {
    let mut stopping = JoinSet::new();
    for mut server in servers {
        stopping.spawn(async move {
            signal_child(&server.child, Signal::TERM);
            if timeout(STOP, server.child.wait()).await.is_err()
                && let Err(error) = server.child.kill().await
            {
                output::complain(&format!("cannot stop {}: {error}", server.plan.name));
            }
        });
    }
    while stopping.join_next().await.is_some() {}
}

/// Sends a signal to a child, unless it has ended and was waited for.
fn signal_child(child: &Child, signal: Signal) {
    let id = child
        .id()
        .and_then(|id| i32::try_from(id).ok())
        .and_then(Pid::from_raw);
    if let Some(id) = id
        && let Err(error) = kill_process(id, signal)
    {
        tracing::debug!(%error, "the process has ended");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_port_that_is_taken_is_refused() {
        let taken = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let port = taken.local_addr().unwrap().port();
        assert!(check_free(&[port]).is_err());
    }

    #[test]
    fn ports_as_documented_and_never_beyond_the_last() {
        assert_eq!(ports(2379, 3).unwrap(), [2379, 22379, 32379]);
        assert_eq!(ports(2379, 5).unwrap(), [2379, 22379, 32379, 42379, 52379]);
        assert_eq!(ports(65534, 1).unwrap(), [65534]);
        assert_eq!(ports(65535, 1).unwrap_err().code, USAGE);
        let failure = ports(45_000, 3).unwrap_err();
        assert!(
            failure.message.contains("at most 35534"),
            "{}",
            failure.message
        );
        assert!(ports(1, 7).is_err());
        assert_eq!(ports(35_534, 3).unwrap(), [35534, 55534, 65534]);
    }
}
