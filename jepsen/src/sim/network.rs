//! Who can reach whom, and what the weather is like.

use std::collections::BTreeSet;

use super::settings::{Settings, Weather};

/// See the module. Directions are cut one by one, so that a link can fail one
/// way.
#[derive(Debug)]
pub(crate) struct Network {
    /// From node to node.
    cut: BTreeSet<(usize, usize)>,
    /// Between client and node, both ways.
    client_cut: BTreeSet<(usize, usize)>,
    usual: Weather,
    weather: Weather,
    /// For each link between nodes: the latest arrival so far.
    latest: Vec<u64>,
    nodes: usize,
    /// Raised by each change, so that an old end does not undo a new fault.
    since: u64,
}

impl Network {
    pub(crate) fn new(settings: &Settings) -> Self {
        Self {
            cut: BTreeSet::new(),
            client_cut: BTreeSet::new(),
            usual: settings.weather,
            weather: settings.weather,
            latest: vec![0; settings.nodes * settings.nodes],
            nodes: settings.nodes,
            since: 0,
        }
    }

    pub(crate) fn weather(&self) -> Weather {
        self.weather
    }

    pub(crate) fn is_cut(&self, from: usize, to: usize) -> bool {
        self.cut.contains(&(from, to))
    }

    pub(crate) fn is_client_cut(&self, actor: usize, node: usize) -> bool {
        self.client_cut.contains(&(actor, node))
    }

    /// Notes an arrival on a link; whether one sent earlier comes later.
    pub(crate) fn overtakes(&mut self, from: usize, to: usize, at_us: u64) -> bool {
        let latest = &mut self.latest[from * self.nodes + to];
        let overtakes = at_us < *latest;
        *latest = at_us.max(*latest);
        overtakes
    }

    /// Begins a fault of the network; the number ends it.
    pub(crate) fn begin(&mut self) -> u64 {
        self.since += 1;
        self.heal();
        self.since
    }

    pub(crate) fn cut(&mut self, from: usize, to: usize) {
        self.cut.insert((from, to));
    }

    pub(crate) fn cut_client(&mut self, actor: usize, node: usize) {
        self.client_cut.insert((actor, node));
    }

    pub(crate) fn storm(&mut self, weather: Weather) {
        self.weather = weather;
    }

    /// Ends the fault with this number, if no other has begun since.
    pub(crate) fn end(&mut self, since: u64) {
        if self.since == since {
            self.heal();
        }
    }

    /// Good weather for good.
    pub(crate) fn calm(&mut self) {
        self.usual = Weather::CALM;
        self.heal();
    }

    fn heal(&mut self) {
        self.cut.clear();
        self.client_cut.clear();
        self.weather = self.usual;
    }
}
