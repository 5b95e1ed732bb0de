//! Many watchers at a time: what they take in memory, and how soon all of them know.

use std::{
    error::Error,
    fs,
    time::{Duration, Instant},
};

use etcd_client::{Client, WatchOptions, WatchStream};
use tokio::task::LocalSet;

use crate::Arguments;

type Failure = Box<dyn Error>;

/// Puts whose events are waited for, one after the other.
const ROUNDS: usize = 21;
/// What servers put off is done.
const REST: Duration = Duration::from_secs(2);

/// Opens the watchers, and prints what came of it as a line of JSON.
pub async fn run(endpoints: &[String], arguments: &Arguments) -> Result<(), Failure> {
    let connections = arguments.number("connections", 4);
    let mut clients = Vec::new();
    for _ in 0..connections {
        clients.push(crate::connect(endpoints).await?);
    }
    let is_idle = arguments.names.iter().any(|name| name == "idle");
    let many = Many {
        count: arguments.number("watchers", 10_000),
        streams: arguments.number("streams", 100),
        is_idle,
    };
    let pids = arguments.list("pids");
    LocalSet::new().run_until(many.run(clients, &pids)).await
}

struct Many {
    count: usize,
    streams: usize,
    /// Each watches a key of its own, which nobody writes; else all watch one key.
    is_idle: bool,
}

impl Many {
    async fn run(&self, clients: Vec<Client>, pids: &[String]) -> Result<(), Failure> {
        tokio::time::sleep(REST).await;
        let before = memory(pids);
        let since = Instant::now();
        let mut opening = Vec::new();
        for number in 0..self.streams {
            let client = clients[number % clients.len()].clone();
            let (first, last) = (self.first_of(number), self.first_of(number + 1));
            let is_idle = self.is_idle;
            opening.push(tokio::task::spawn_local(async move {
                open(client, first..last, is_idle)
                    .await
                    .map_err(|e| e.to_string())
            }));
        }
        let mut streams = Vec::new();
        for stream in opening {
            streams.push(stream.await??);
        }
        let opened = since.elapsed();
        tokio::time::sleep(REST).await;
        let taken = memory(pids).saturating_sub(before);
        let mut client = clients[0].clone();
        let mut times = Vec::new();
        for _ in 0..ROUNDS {
            let since = Instant::now();
            client.put("watched", "value", None).await?;
            if !self.is_idle {
                streams = self.told(streams).await?;
            }
            times.push(since.elapsed());
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        times.sort_unstable();
        println!(
            "{{\"watchers\":{},\"streams\":{},\"idle\":{},\"opened_ms\":{},\
             \"bytes_per_watcher\":{},\"last_told_p50_us\":{},\"last_told_max_us\":{}}}",
            self.count,
            self.streams,
            self.is_idle,
            opened.as_millis(),
            taken / self.count.max(1) as u64,
            times[ROUNDS / 2].as_micros(),
            times[ROUNDS - 1].as_micros(),
        );
        Ok(())
    }

    fn first_of(&self, stream: usize) -> usize {
        self.count * stream / self.streams
    }

    /// Once every watcher has its event.
    async fn told(&self, streams: Vec<WatchStream>) -> Result<Vec<WatchStream>, Failure> {
        let mut waiting = Vec::new();
        for (number, mut stream) in streams.into_iter().enumerate() {
            let watchers = self.first_of(number + 1) - self.first_of(number);
            waiting.push(tokio::task::spawn_local(async move {
                let mut left = watchers;
                while left > 0 {
                    let told = stream.message().await.map_err(|e| e.to_string())?;
                    left -= told.ok_or("a stream has ended")?.events().len();
                }
                Ok::<_, String>(stream)
            }));
        }
        let mut streams = Vec::new();
        for stream in waiting {
            streams.push(stream.await??);
        }
        Ok(streams)
    }
}

/// A stream with so many watchers, all of them confirmed.
async fn open(
    mut client: Client,
    watchers: std::ops::Range<usize>,
    is_idle: bool,
) -> Result<WatchStream, Failure> {
    let key_of = |watcher| match is_idle {
        true => format!("idle/{watcher:08}"),
        false => "watched".to_owned(),
    };
    let options = || Some(WatchOptions::new());
    let mut stream = client.watch(key_of(watchers.start), options()).await?;
    stream.message().await?.ok_or("the stream has ended")?;
    for watcher in watchers.skip(1) {
        stream.watch(key_of(watcher), options()).await?;
        stream.message().await?.ok_or("the stream has ended")?;
    }
    Ok(stream)
}

/// What these processes have in memory, in bytes.
fn memory(pids: &[String]) -> u64 {
    let kib = pids.iter().map(|pid| {
        let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
        let value = line.and_then(|line| line.split_whitespace().next()?.parse().ok());
        value.unwrap_or(0u64)
    });
    kib.sum::<u64>() * 1024
}
