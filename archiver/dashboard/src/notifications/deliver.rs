//! Sends a notification to a target once, without retries.

use repository::config::{NotifyKind, NotifyTarget};

use super::{
    client,
    error::{ATTEMPT_TIMEOUT, NotifyError},
    message,
    notification::{Links, Notification},
    smtp,
};

/// Sends a notification to one target, without retries.
///
/// # Errors
/// [`NotifyError`].
pub async fn send(
    target: &NotifyTarget,
    notification: &Notification,
    links: &Links,
) -> Result<(), NotifyError> {
    let sending = async {
        match target.kind {
            NotifyKind::Webhook => {
                client::post(target, &message::webhook(notification, links)).await
            }
            NotifyKind::Slack => client::post(target, &message::slack(notification, links)).await,
            NotifyKind::Pagerduty => {
                let key = target.routing_key.reveal();
                client::post(target, &message::pagerduty(notification, links, key)).await
            }
            NotifyKind::Email => {
                let (subject, text) = message::mail(notification, links);
                smtp::send(target, &subject, &text).await
            }
            NotifyKind::Heartbeat => client::post(target, &message::heartbeat(links)).await,
        }
    };
    within_limit(sending).await
}

/// Sends a test notification to one target, and then its end, so that no incident stays open at the
/// receiver.
///
/// # Errors
/// [`NotifyError`].
pub async fn test(target: &NotifyTarget, links: &Links) -> Result<(), NotifyError> {
    let mut notification = Notification::test();
    send(target, &notification, links).await?;
    notification.ended = Some(notification.alert.since);
    send(target, &notification, links).await
}

/// Sends a daily summary to a mail target, without retries.
pub(super) async fn send_summary(
    target: &NotifyTarget,
    subject: &str,
    text: &str,
) -> Result<(), NotifyError> {
    within_limit(smtp::send(target, subject, text)).await
}

async fn within_limit(
    sending: impl Future<Output = Result<(), NotifyError>>,
) -> Result<(), NotifyError> {
    tokio::time::timeout(ATTEMPT_TIMEOUT, sending)
        .await
        .unwrap_or(Err(NotifyError::Timeout))
}
