//! Ages in the short form of `kubectl`: `5s`, `2m3s`, `4h`, `3d4h`, `1y20d`.

use jiff::Timestamp;

/// The time from `since` to `now`, both RFC 3339; `<unknown>` when `since` is empty or unreadable.
pub(crate) fn age(since: &str, now: &str) -> String {
    match (since.parse::<Timestamp>(), now.parse::<Timestamp>()) {
        (Ok(since), Ok(now)) => short(now.as_second().saturating_sub(since.as_second())),
        _ => "<unknown>".to_owned(),
    }
}

/// A duration in seconds, two units at most, the second only while it matters.
pub(crate) fn short(seconds: i64) -> String {
    const DAY: i64 = 24;
    const YEAR: i64 = 365;
    // Clocks of two machines differ a little: a second in the future is now.
    if seconds < -1 {
        return "<invalid>".to_owned();
    }
    if seconds < 0 {
        return "0s".to_owned();
    }
    if seconds < 120 {
        return format!("{seconds}s");
    }
    let pair = |big: i64, unit: &str, small: i64, small_unit: &str| {
        if small == 0 { format!("{big}{unit}") } else { format!("{big}{unit}{small}{small_unit}") }
    };
    let minutes = seconds / 60;
    if minutes < 10 {
        return pair(minutes, "m", seconds % 60, "s");
    }
    if minutes < 180 {
        return format!("{minutes}m");
    }
    let hours = minutes / 60;
    if hours < 8 {
        return pair(hours, "h", minutes % 60, "m");
    }
    if hours < 2 * DAY {
        return format!("{hours}h");
    }
    let days = hours / DAY;
    if hours < 8 * DAY {
        return pair(days, "d", hours % DAY, "h");
    }
    if hours < 2 * YEAR * DAY {
        return format!("{days}d");
    }
    let years = days / YEAR;
    if hours < 8 * YEAR * DAY {
        return pair(years, "y", days % YEAR, "d");
    }
    format!("{years}y")
}
