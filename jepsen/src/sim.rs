//! The simulated world, in reading order: [`world`] is where things happen,
//! [`node`] is a server, [`client`], [`register`], [`kv`], [`lease`], [`watch`] and
//! [`operator`] are who calls it, most of them at a [`pace`], [`faults`] is what goes
//! wrong, [`ground`] is what all of them stand on, and [`checks`] tells the checkers what
//! happened, with [`replay`] for what was committed.

mod alarm;
mod checks;
mod client;
mod clock;
mod faults;
mod ground;
mod kv;
mod lease;
mod link;
mod network;
mod node;
mod operator;
mod pace;
mod queue;
mod register;
mod replay;
mod settings;
mod stream;
mod tally;
mod watch;
mod world;

pub(crate) use self::{
    tally::Tally,
    world::{Outcome, World},
};
