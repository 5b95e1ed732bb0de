//! Requests to stop: by signal, or from the program that runs the server.

use std::{future::pending, io};

use tokio::{
    signal::unix::{Signal, SignalKind, signal},
    sync::mpsc,
};

/// When a server is to stop. The first request is served gracefully, the second
/// at once.
#[derive(Debug)]
pub struct Shutdown(Source);

#[derive(Debug)]
enum Source {
    Signals,
    Stopper(mpsc::UnboundedReceiver<()>),
}

/// Asks a server to stop. Dropping it asks for nothing.
#[derive(Clone, Debug)]
pub struct Stopper(mpsc::UnboundedSender<()>);

impl Shutdown {
    /// SIGTERM and SIGINT are requests.
    pub fn on_signals() -> Self {
        Self(Source::Signals)
    }

    /// Each [`Stopper::stop`] is a request.
    pub fn on_request() -> (Stopper, Self) {
        let (sender, receiver) = mpsc::unbounded_channel();
        (Stopper(sender), Self(Source::Stopper(receiver)))
    }

    /// Begins to listen. Must run inside a runtime.
    pub(crate) fn listen(self) -> io::Result<Requests> {
        Ok(match self.0 {
            Source::Signals => Requests::Signals {
                terminate: signal(SignalKind::terminate())?,
                interrupt: signal(SignalKind::interrupt())?,
            },
            Source::Stopper(receiver) => Requests::Stopper(receiver),
        })
    }
}

impl Stopper {
    /// Asks the server to stop; a second time: at once.
    pub fn stop(&self) {
        // A server that is gone has stopped.
        self.0.send(()).ok();
    }
}

/// A [`Shutdown`] that listens.
#[derive(Debug)]
pub(crate) enum Requests {
    Signals {
        terminate: Signal,
        interrupt: Signal,
    },
    Stopper(mpsc::UnboundedReceiver<()>),
}

impl Requests {
    /// The next request to stop.
    pub(crate) async fn next(&mut self) {
        match self {
            Self::Signals {
                terminate,
                interrupt,
            } => tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
            },
            Self::Stopper(receiver) => {
                if receiver.recv().await.is_none() {
                    pending().await
                }
            }
        }
    }
}
