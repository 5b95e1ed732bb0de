//! Workloads, faults and checkers for Conclave, in two worlds that share the
//! checkers: a deterministic simulator, and real processes ([`real`]).
//!
//! A run of the simulator is one seed: three or five servers, clients and an operator in one
//! thread, with simulated time. What runs is the real code: the replica with
//! consensus, sessions and locks (`conclave_core`, `conclave_primitives`), the
//! write-ahead log with its recovery, and the client library's logic of sessions
//! and requests. What is modelled is what they stand on:
//!
//! - **network**: every message between servers, and every call, answer and event
//!   of clients, is late by its own time; some are lost, doubled or overtaken;
//!   partitions split, isolate the leader, or cut one way; connections break;
//! - **disk**: what was written and not synced may be lost by sector; syncs take
//!   time, may take long, and may fail, which ends the process;
//! - **processes**: crash and start again (alone or all), stand still (alone or
//!   all) while what arrives waits;
//! - **clocks**: each server and client has its own rate within 5 % of true, its
//!   own zero, and a server's may start again with its machine.
//!
//! First everything goes wrong for a while; then all faults stop and everybody
//! must be served again; then clients finish, and nothing may be left over. What
//! is checked all the time is in [`checkers`].
//!
//! Not modelled: gRPC and its connections, threads, the file system's own faults
//! beyond lost writes (no damaged sectors, no full disk), a server that loses its
//! whole disk, changes of membership, processor time. Those have tests of their
//! own, on real machines.

mod checkers;
mod plants;
mod real;
mod rng;
mod runner;
mod sim;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Tests Conclave against its promises.
#[derive(Debug, Parser)]
#[command(name = "conclave-jepsen", version)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Simulates a row of seeds.
    ///
    /// Exits with 0 if no promise was broken and (from 20 seeds) every fault and
    /// operation occurred, 1 if one was broken, 2 for wrong usage, 3 if the
    /// harness failed or something never occurred.
    Sim(runner::Options),
    /// Simulates every planted bug until a checker finds it.
    ///
    /// Exits with 0 if each is found, 1 if one is not, 3 if the harness failed.
    Plants(plants::Options),
    /// Hurts a cluster of real servers while real clients use it.
    #[command(after_help = real::HELP)]
    Real(real::Options),
}

fn main() -> ExitCode {
    match Arguments::parse().command {
        Command::Sim(options) => runner::run(&options),
        Command::Plants(options) => plants::run(&options),
        Command::Real(options) => real::run(&options),
    }
}
