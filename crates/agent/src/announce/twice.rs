//! A request that is sent a second time, beside the first, when that is not answered soon: it may be slow, or lost.

use std::time::Duration;

use tokio::time::error::Elapsed;
use tokio::time::{Instant, sleep_until, timeout, timeout_at};

/// A request that is not answered within it is sent once more.
pub(super) const ONCE_MORE: Duration = Duration::from_millis(250);

/// The answer to a request that is sent again when there is none yet; the better one, if there are two until then. Of two writes of the same
/// version one fails.
pub(super) async fn once_or_twice<T, E, F>(ask: impl Fn() -> F, until: Instant) -> Result<Result<T, E>, Elapsed>
where
    F: Future<Output = Result<T, E>>,
{
    let first = ask();
    tokio::pin!(first);
    if let Ok(answer) = timeout(ONCE_MORE, &mut first).await {
        return Ok(answer);
    }
    let second = ask();
    tokio::pin!(second);
    let failed = tokio::select! {
        answer = &mut first => answer.map_err(|error| (error, true)),
        answer = &mut second => answer.map_err(|error| (error, false)),
        () = sleep_until(until) => return timeout(Duration::ZERO, std::future::pending()).await,
    };
    let (error, was_first) = match failed {
        Ok(answer) => return Ok(Ok(answer)),
        Err(failed) => failed,
    };
    let other = async { if was_first { second.await } else { first.await } };
    match timeout_at(until, other).await {
        Ok(Ok(answer)) => Ok(Ok(answer)),
        _ => Ok(Err(error)),
    }
}

#[cfg(test)]
mod tests {
    use tokio::time::sleep;

    use super::*;

    #[tokio::test]
    async fn of_two_answers_the_better_one_counts_and_a_slow_one_is_waited_for() {
        // What the first and the second request are answered with, and after how many milliseconds.
        let answered = async |first: (u64, Result<u8, u8>), second: (u64, Result<u8, u8>), until: u64| {
            let asked = std::cell::Cell::new(0_u64);
            let ask = || {
                asked.set(asked.get() + 1);
                let (after, answer) = if asked.get() == 1 { first } else { second };
                async move {
                    sleep(Duration::from_millis(after)).await;
                    answer
                }
            };
            let answer = once_or_twice(ask, Instant::now() + Duration::from_millis(until)).await;
            (answer.ok(), asked.get())
        };
        let never = (60_000, Ok(9));
        assert_eq!(answered((0, Ok(1)), never, 5000).await, (Some(Ok(1)), 1));
        assert_eq!(answered((0, Err(1)), never, 5000).await, (Some(Err(1)), 1), "a refusal is an answer");
        assert_eq!(answered(never, (0, Ok(2)), 5000).await, (Some(Ok(2)), 2), "the first is lost");
        assert_eq!(answered((700, Ok(1)), never, 5000).await, (Some(Ok(1)), 2), "the first is slow");
        assert_eq!(answered((700, Ok(1)), (10, Err(2)), 5000).await, (Some(Ok(1)), 2), "the first was written, late");
        assert_eq!(answered(never, (10, Err(2)), 500).await, (Some(Err(2)), 2));
        assert_eq!(answered(never, never, 400).await, (None, 2));
    }
}
