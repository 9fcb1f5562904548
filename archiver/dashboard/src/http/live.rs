//! `/api/v1/events/stream`: server-sent events. Sends `status` of each cluster every second, and
//! `alert` and `event` when they happen.
//!
//! A slow reader misses messages, but never delays anything else. The stream ends after a while,
//! and browsers reconnect automatically.

use std::{
    sync::atomic::{AtomicUsize, Ordering},
    time::Duration,
};

use bytes::Bytes;
use hyper::{StatusCode, header::HeaderValue};
use tokio::{
    sync::{broadcast::error::RecvError, mpsc},
    time::{Instant, timeout, timeout_at},
};

use super::{
    answer::{Answer, Content, problem, with_headers},
    connections::BusyGuard,
};
use crate::monitor::Monitor;

/// The maximum number of readers.
const READERS_MAX: usize = 64;
/// The number of messages buffered for each socket.
const BUFFER: usize = 16;
/// The time without a message after which a comment is sent, so that proxies keep the connection
/// open.
const PING: Duration = Duration::from_secs(15);
/// The time after which a reader that accepts no data counts as gone.
const STUCK: Duration = Duration::from_secs(20);
/// The lifetime of a stream.
const LIFETIME: Duration = Duration::from_secs(540);

static READERS: AtomicUsize = AtomicUsize::new(0);

struct Reader;

impl Drop for Reader {
    fn drop(&mut self) {
        READERS.fetch_sub(1, Ordering::Relaxed);
    }
}

pub(super) fn stream(monitor: &Monitor, busy: BusyGuard) -> Answer {
    if READERS.fetch_add(1, Ordering::Relaxed) >= READERS_MAX {
        drop(Reader);
        return problem(
            StatusCode::SERVICE_UNAVAILABLE,
            "too many live streams; ask /api/v1/clusters instead",
        );
    }
    let reader = Reader;
    let (sender, receiver) = mpsc::channel(BUFFER);
    let mut messages = monitor.subscribe();
    tokio::spawn(async move {
        let _reader = reader;
        let end = Instant::now() + LIFETIME;
        let send = |text: String| {
            let sender = sender.clone();
            async move {
                let sent = timeout(STUCK, sender.send(Bytes::from(text))).await;
                matches!(sent, Ok(Ok(())))
            }
        };
        if !send("retry: 2000\n\n".to_owned()).await {
            return;
        }
        let mut number = 0_u64;
        while Instant::now() < end {
            let next = timeout_at((Instant::now() + PING).min(end), messages.recv()).await;
            let text = match next {
                Ok(Ok(message)) => {
                    number += 1;
                    format!(
                        "id: {number}\nevent: {}\ndata: {}\n\n",
                        message.event, message.data
                    )
                }
                Ok(Err(RecvError::Lagged(missed))) => {
                    format!(": {missed} messages were missed\n\n")
                }
                Ok(Err(RecvError::Closed)) => return,
                Err(_) => ": ping\n\n".to_owned(),
            };
            if !send(text).await {
                return;
            }
        }
    });
    let mut answer = with_headers(
        StatusCode::OK,
        "text/event-stream",
        Content::Live {
            messages: receiver,
            _busy: busy,
        },
    );
    answer
        .headers_mut()
        .insert("x-accel-buffering", HeaderValue::from_static("no"));
    answer
}
