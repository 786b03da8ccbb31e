//! Resource quantities: `100m`, `1Gi`, `5e3`.
//!
//! Compared exactly, as integers of 10⁻⁹ (the finest a quantity can hold).

use std::cmp::Ordering;

/// What Kubernetes says of a quantity it cannot read.
pub(crate) const MALFORMED: &str =
    "quantities must match the regular expression '^([+-]?[0-9.]+)([eEinumkKMGTP]*[-+]?[0-9]*)$'";

const NANOS: i128 = 1_000_000_000;

/// A quantity's value in 10⁻⁹ units, capped at what an `i128` holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Quantity {
    nanos: i128,
}

impl PartialOrd for Quantity {
    fn partial_cmp(&self, other: &Quantity) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Quantity {
    fn cmp(&self, other: &Quantity) -> Ordering {
        self.nanos.cmp(&other.nanos)
    }
}

impl Quantity {
    /// A whole number.
    pub fn whole(number: u64) -> Quantity {
        Quantity { nanos: i128::from(number) * NANOS }
    }

    /// Reads a quantity; none when it is malformed.
    pub fn parse(text: &str) -> Option<Quantity> {
        let (sign, rest) = match text.as_bytes().first()? {
            b'+' => (1, text.get(1..)?),
            b'-' => (-1, text.get(1..)?),
            _ => (1, text),
        };
        let end = rest.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(rest.len());
        let (number, suffix) = rest.split_at_checked(end)?;
        let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
        if (whole.is_empty() && fraction.is_empty()) || fraction.contains('.') {
            return None;
        }
        let (multiplier, power) = scale(suffix)?;
        let digits: i128 = format!("{whole}{fraction}").parse().unwrap_or(i128::MAX / NANOS);
        let shift = power.saturating_add(9).saturating_sub(i32::try_from(fraction.len()).unwrap_or(i32::MAX));
        let scaled = digits.saturating_mul(multiplier);
        Some(Quantity { nanos: sign * shift_decimal(scaled, shift) })
    }

    /// How often `divisor` goes into it, rounded up; none if that is zero.
    pub fn divided_up(self, divisor: Quantity) -> Option<i128> {
        let (whole, rest) = (self.nanos.checked_div(divisor.nanos)?, self.nanos.checked_rem(divisor.nanos)?);
        Some(whole + i128::from(rest != 0 && (rest < 0) == (divisor.nanos < 0)))
    }

    /// Whether it is below zero.
    pub(crate) fn is_negative(self) -> bool {
        self.nanos < 0
    }

    /// Whether it is zero.
    pub(crate) fn is_zero(self) -> bool {
        self.nanos == 0
    }

    /// Whether it is a whole number.
    pub(crate) fn is_whole(self) -> bool {
        self.nanos % NANOS == 0
    }
}

/// Multiplier and power of ten of a suffix.
fn scale(suffix: &str) -> Option<(i128, i32)> {
    let binary = |power: u32| Some((1i128 << (10 * power), 0));
    match suffix {
        "" => Some((1, 0)),
        "n" => Some((1, -9)),
        "u" => Some((1, -6)),
        "m" => Some((1, -3)),
        "k" => Some((1, 3)),
        "M" => Some((1, 6)),
        "G" => Some((1, 9)),
        "T" => Some((1, 12)),
        "P" => Some((1, 15)),
        "E" => Some((1, 18)),
        "Ki" => binary(1),
        "Mi" => binary(2),
        "Gi" => binary(3),
        "Ti" => binary(4),
        "Pi" => binary(5),
        "Ei" => binary(6),
        _ => {
            let exponent = suffix.strip_prefix(['e', 'E'])?;
            exponent.parse::<i32>().ok().map(|power| (1, power))
        }
    }
}

/// `value × 10^shift`; what does not fit is rounded up (away from zero) or capped.
fn shift_decimal(value: i128, shift: i32) -> i128 {
    if shift >= 0 {
        let factor = 10i128.checked_pow(shift.unsigned_abs()).unwrap_or(i128::MAX);
        return value.saturating_mul(factor);
    }
    match 10i128.checked_pow(shift.unsigned_abs()) {
        Some(factor) => value / factor + i128::from(value % factor != 0),
        None => i128::from(value != 0),
    }
}

/// The quantity rounded up to thousandths, when it is finer than that.
pub(crate) fn round_up_to_milli(text: &str) -> Option<String> {
    const MICROS: i128 = 1_000_000;
    let Quantity { nanos } = Quantity::parse(text)?;
    if nanos % MICROS == 0 {
        return None;
    }
    let milli = nanos.div_euclid(MICROS).saturating_add(1);
    Some(decimal(milli.saturating_mul(MICROS)))
}

/// The canonical form, which the API server stores: no fraction and the largest suffix of the family that was given.
pub(crate) fn canonical(text: &str) -> Option<String> {
    let Quantity { nanos } = Quantity::parse(text)?;
    let suffix = text.trim_start_matches(['+', '-']).trim_start_matches(|c: char| c.is_ascii_digit() || c == '.');
    let exponent = suffix.starts_with(['e', 'E']) && suffix.len() > 1;
    if suffix.ends_with('i') && nanos.abs() >= 1024 * NANOS {
        let mut number = nanos.div_euclid(NANOS).saturating_add(i128::from(nanos.rem_euclid(NANOS) != 0));
        let mut power = 0usize;
        while number % 1024 == 0 && power < 6 {
            number /= 1024;
            power += 1;
        }
        return Some(format!(
            "{number}{}",
            ["", "Ki", "Mi", "Gi", "Ti", "Pi", "Ei"].get(power).copied().unwrap_or_default()
        ));
    }
    if exponent {
        let (number, power) = reduced(nanos);
        return Some(if power == 0 { number.to_string() } else { format!("{number}e{power}") });
    }
    Some(decimal(nanos))
}

/// Number and power of ten, the power a multiple of three and as large as possible.
fn reduced(nanos: i128) -> (i128, i32) {
    let (mut number, mut power) = (nanos, -9);
    if number == 0 {
        return (0, 0);
    }
    while number % 1000 == 0 && power < 18 {
        number /= 1000;
        power += 3;
    }
    (number, power)
}

fn decimal(nanos: i128) -> String {
    let (number, power) = reduced(nanos);
    let suffix = match power {
        -9 => "n",
        -6 => "u",
        -3 => "m",
        3 => "k",
        6 => "M",
        9 => "G",
        12 => "T",
        15 => "P",
        18 => "E",
        _ => "",
    };
    format!("{number}{suffix}")
}
