//! Drives servers of the etcd v3 API, whichever they are, with the crate
//! `etcd-client` as it is published:
//!
//! ```sh
//! etcd-compat calls --endpoints A,B,C [--may-refuse NAME,NAME]
//! etcd-compat bench --endpoints A,B,C [--clients 64] [--seconds 5] [--keys N] \
//!     [--pids P,P,P] [NAME...]
//! etcd-compat watchers --endpoints A,B,C [--watchers 10000] [--streams 100] \
//!     [--pids P,P,P] [idle]
//! ```
//!
//! `calls` makes every call that the crate has, and checks what comes back. `bench`
//! prints one line of JSON for each workload; with the servers' process ids it also
//! says how much processor time they took. `watchers` opens many watchers of one key, or
//! idle ones of a key each, and says what one takes in memory and when the last is told.

mod bench;
mod calls;
mod watchers;

use std::{collections::BTreeMap, process::ExitCode, time::Duration};

use etcd_client::{Client, Error};

const USAGE: &str = "etcd-compat calls|bench|watchers --endpoints A,B,C [--may-refuse NAME,NAME] \
                     [--clients N] [--connections N] [--seconds S] [--keys N] [--pids P,P] \
                     [--watchers N] [--streams N] [NAME...]";

/// What the command line says: options with their values, and names.
struct Arguments {
    options: BTreeMap<String, String>,
    names: Vec<String>,
}

impl Arguments {
    fn read(arguments: impl Iterator<Item = String>) -> Option<Self> {
        let (mut options, mut names) = (BTreeMap::new(), Vec::new());
        let mut arguments = arguments;
        while let Some(argument) = arguments.next() {
            match argument.strip_prefix("--") {
                Some(option) => drop(options.insert(option.to_owned(), arguments.next()?)),
                None => names.push(argument),
            }
        }
        Some(Self { options, names })
    }

    fn list(&self, option: &str) -> Vec<String> {
        let value = self.options.get(option).map_or("", String::as_str);
        let items = value.split(',').filter(|item| !item.is_empty());
        items.map(str::to_owned).collect()
    }

    fn number(&self, option: &str, default: usize) -> usize {
        let value = self.options.get(option);
        value.map_or(default, |value| value.parse().expect("a number"))
    }
}

/// A client with a connection to each endpoint, once they serve.
async fn connect(endpoints: &[String]) -> Result<Client, Error> {
    const TRIES: u32 = 100;
    let mut client = Client::connect(endpoints, None).await?;
    for _ in 0..TRIES {
        if client.get("a", None).await.is_ok() {
            return Ok(client);
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    client.get("a", None).await?;
    Ok(client)
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    let mut words = std::env::args().skip(1);
    let command = words.next().unwrap_or_default();
    let Some(arguments) = Arguments::read(words) else {
        eprintln!("{USAGE}");
        return ExitCode::from(64);
    };
    let endpoints = arguments.list("endpoints");
    let result = match command.as_str() {
        "calls" if !endpoints.is_empty() => {
            calls::run(&endpoints, &arguments.list("may-refuse")).await
        }
        "bench" if !endpoints.is_empty() => bench::run(&endpoints, &arguments).await,
        "watchers" if !endpoints.is_empty() => watchers::run(&endpoints, &arguments).await,
        _ => {
            eprintln!("{USAGE}");
            return ExitCode::from(64);
        }
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("etcd-compat: {error}");
            ExitCode::FAILURE
        }
    }
}
