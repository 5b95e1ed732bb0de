//! Messages on their way to one member.

use std::{
    collections::VecDeque,
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError, atomic::Ordering},
    task::{Context, Poll, Waker},
};

use conclave_proto::internal::{PeerFrame, PeerGreeting, PeerMessage};
use prost::Message as _;
use tokio_stream::Stream;

use crate::metrics::LinkCounters;

/// Messages that wait for a member that reads slowly.
const QUEUED_MAX: usize = 8_192;
/// Their bytes.
const QUEUED_BYTES_MAX: usize = 64 << 20;
/// Messages in one frame.
const FRAME_MESSAGES_MAX: usize = 256;
/// Bytes after which a frame takes no further message.
const FRAME_BYTES_ENOUGH: usize = 1 << 20;

/// A bounded queue, open only while a stream drains it.
#[derive(Debug, Default)]
pub(super) struct Outbox {
    queue: Mutex<Queue>,
    counters: LinkCounters,
}

#[derive(Debug, Default)]
struct Queue {
    /// Which stream drains it: an older one may still be around.
    stream: u64,
    open: bool,
    messages: VecDeque<(PeerMessage, usize)>,
    bytes: usize,
    reader: Option<Waker>,
}

impl Outbox {
    /// Queues a message, or drops it if no stream stands or too much waits. The
    /// stream sees it after [`Outbox::wake`].
    pub(super) fn push(&self, message: PeerMessage) {
        let bytes = message.encoded_len();
        let mut queue = self.queue();
        let full = queue.messages.len() >= QUEUED_MAX || queue.bytes + bytes > QUEUED_BYTES_MAX;
        if !queue.open || full {
            self.counters.dropped.fetch_add(1, Ordering::Relaxed);
            return;
        }
        queue.messages.push_back((message, bytes));
        queue.bytes += bytes;
    }

    /// Lets the stream look for messages.
    pub(super) fn wake(&self) {
        let mut queue = self.queue();
        if queue.messages.is_empty() {
            return;
        }
        let reader = queue.reader.take();
        drop(queue);
        if let Some(reader) = reader {
            reader.wake();
        }
    }

    /// Begins a stream: first the greeting, then what is queued from now on. A
    /// stream that was begun before ends.
    pub(super) fn open(self: &Arc<Self>, greeting: PeerGreeting) -> Frames {
        let mut queue = self.queue();
        let stream = queue.stream + 1;
        let before = std::mem::replace(
            &mut *queue,
            Queue {
                stream,
                open: true,
                ..Queue::default()
            },
        );
        drop(queue);
        if let Some(reader) = before.reader {
            reader.wake();
        }
        Frames {
            outbox: Arc::clone(self),
            stream,
            greeting: Some(greeting),
        }
    }

    /// Ends the stream that is open, with what waits for it.
    pub(super) fn close(&self) {
        let mut queue = self.queue();
        let stream = queue.stream;
        *queue = Queue {
            stream,
            ..Queue::default()
        };
    }

    pub(super) fn is_open(&self) -> bool {
        self.queue().open
    }

    pub(super) fn counters(&self) -> &LinkCounters {
        &self.counters
    }

    fn queue(&self) -> MutexGuard<'_, Queue> {
        // Nothing in here can stop half way.
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Queue {
    /// As many messages as fit in one frame.
    fn take_frame(&mut self) -> Vec<PeerMessage> {
        let mut taken = Vec::with_capacity(self.messages.len().min(FRAME_MESSAGES_MAX));
        let mut taken_bytes = 0;
        while taken.len() < FRAME_MESSAGES_MAX && taken_bytes < FRAME_BYTES_ENOUGH {
            let Some((message, bytes)) = self.messages.pop_front() else {
                break;
            };
            taken.push(message);
            taken_bytes += bytes;
        }
        self.bytes -= taken_bytes;
        taken
    }
}

/// One stream of frames to a member.
#[derive(Debug)]
pub(super) struct Frames {
    outbox: Arc<Outbox>,
    stream: u64,
    greeting: Option<PeerGreeting>,
}

impl Stream for Frames {
    type Item = PeerFrame;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<PeerFrame>> {
        if let Some(greeting) = self.greeting.take() {
            return Poll::Ready(Some(PeerFrame {
                greeting: Some(greeting),
                messages: vec![],
            }));
        }
        let mut queue = self.outbox.queue();
        if !queue.open || queue.stream != self.stream {
            return Poll::Ready(None);
        }
        let messages = queue.take_frame();
        if messages.is_empty() {
            queue.reader = Some(context.waker().clone());
            return Poll::Pending;
        }
        drop(queue);
        self.outbox
            .counters
            .sent
            .fetch_add(messages.len() as u64, Ordering::Relaxed);
        Poll::Ready(Some(PeerFrame {
            greeting: None,
            messages,
        }))
    }
}

#[cfg(test)]
mod tests {
    use conclave_proto::internal::peer_message::Message;
    use tokio_stream::StreamExt as _;

    use super::*;

    fn message(bytes: usize) -> PeerMessage {
        PeerMessage {
            message: Some(Message::Raft(vec![0; bytes].into())),
        }
    }

    /// The next frame that is there without waiting.
    fn next(frames: &mut Frames) -> Poll<Option<PeerFrame>> {
        Pin::new(frames).poll_next(&mut Context::from_waker(Waker::noop()))
    }

    fn next_len(frames: &mut Frames) -> usize {
        match next(frames) {
            Poll::Ready(Some(frame)) => frame.messages.len(),
            Poll::Ready(None) => panic!("the stream ended"),
            Poll::Pending => 0,
        }
    }

    #[test]
    fn a_stream_begins_with_the_greeting_and_carries_only_what_came_after() {
        let outbox = Arc::new(Outbox::default());
        outbox.push(message(1));
        let mut frames = outbox.open(PeerGreeting {
            node: 7,
            ..PeerGreeting::default()
        });
        let Poll::Ready(Some(first)) = next(&mut frames) else {
            panic!("no greeting")
        };
        assert_eq!(first.greeting.unwrap().node, 7);
        assert!(next(&mut frames).is_pending());
        outbox.push(message(1));
        outbox.push(message(2));
        assert_eq!(next_len(&mut frames), 2);
        let dropped = outbox.counters.dropped.load(Ordering::Relaxed);
        assert_eq!(
            (dropped, outbox.counters.sent.load(Ordering::Relaxed)),
            (1, 2)
        );
    }

    #[test]
    fn frames_are_bounded_in_messages_and_bytes() {
        let outbox = Arc::new(Outbox::default());
        let mut frames = outbox.open(PeerGreeting::default());
        next_len(&mut frames);
        for _ in 0..300 {
            outbox.push(message(1));
        }
        assert_eq!([next_len(&mut frames), next_len(&mut frames)], [256, 44]);
        for _ in 0..3 {
            outbox.push(message(600 << 10));
        }
        assert_eq!([next_len(&mut frames), next_len(&mut frames)], [2, 1]);
        assert_eq!(outbox.queue().bytes, 0);
    }

    #[test]
    fn a_member_that_does_not_read_costs_bounded_memory() {
        let outbox = Arc::new(Outbox::default());
        let _frames = outbox.open(PeerGreeting::default());
        for _ in 0..QUEUED_MAX + 5 {
            outbox.push(message(1));
        }
        assert_eq!(outbox.queue().messages.len(), QUEUED_MAX);
        assert_eq!(outbox.counters.dropped.load(Ordering::Relaxed), 5);
        let _frames = outbox.open(PeerGreeting::default());
        for _ in 0..70 {
            outbox.push(message(1 << 20));
        }
        assert_eq!(outbox.queue().messages.len(), 63);
    }

    #[tokio::test]
    async fn a_new_stream_ends_the_one_before() {
        let outbox = Arc::new(Outbox::default());
        let mut old = outbox.open(PeerGreeting::default());
        old.next().await;
        let reading = tokio::spawn(async move { old.next().await });
        tokio::task::yield_now().await;
        let mut new = outbox.open(PeerGreeting::default());
        assert_eq!(reading.await.unwrap(), None);
        new.next().await;
        let reading = tokio::spawn(async move { (new.next().await, new) });
        tokio::task::yield_now().await;
        outbox.push(message(1));
        outbox.wake();
        let (frame, mut new) = reading.await.unwrap();
        assert_eq!(frame.unwrap().messages.len(), 1);
        outbox.close();
        assert_eq!(new.next().await, None);
    }
}
