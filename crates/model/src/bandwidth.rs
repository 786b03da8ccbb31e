//! How much a pod may receive and send: what its annotations ask for, as Kubernetes understands them.

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};

/// Annotation of a pod: the most that it receives, a quantity of bits a second.
pub const INGRESS_BANDWIDTH_ANNOTATION: &str = "kubernetes.io/ingress-bandwidth";
/// The same of what it sends.
pub const EGRESS_BANDWIDTH_ANNOTATION: &str = "kubernetes.io/egress-bandwidth";

/// No more of what is not understood is kept, in characters.
const KEPT: usize = 40;
/// Digits after which a quantity is no longer looked at: far more than one within the bounds needs.
const DIGITS: usize = 64;

/// Bits a second, within the bounds that Kubernetes sets (`validateBandwidthIsReasonable` of its `pkg/util/bandwidth`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "u64", into = "u64")]
pub struct Rate(u64);

impl Rate {
    /// The least: 1k.
    pub const LEAST: Self = Self(1_000);
    /// The most: 1P.
    pub const MOST: Self = Self(1_000_000_000_000_000);

    /// That many bits a second; none outside the bounds.
    pub fn new(bits: u64) -> Option<Self> {
        (Self::LEAST.0..=Self::MOST.0).contains(&bits).then_some(Self(bits))
    }

    /// A quantity as Kubernetes writes it (`10M`, `1.5Gi`, `2e6`), rounded up to whole bits; none if it is no quantity, or outside the bounds.
    pub fn parse(text: &str) -> Option<Self> {
        quantity(text).and_then(Self::new)
    }

    /// Bits a second.
    pub fn bits(self) -> u64 {
        self.0
    }

    /// Whole bytes a second, rounded up.
    pub fn bytes(self) -> u64 {
        self.0.div_ceil(8)
    }
}

impl From<Rate> for u64 {
    fn from(rate: Rate) -> Self {
        rate.0
    }
}

impl TryFrom<u64> for Rate {
    type Error = String;

    fn try_from(bits: u64) -> Result<Self, String> {
        Self::new(bits).ok_or_else(|| format!("{bits} is not {BOUNDS}"))
    }
}

/// The shortest quantity of the rate.
impl fmt::Display for Rate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let units = [
            (1_000_000_000_000_000, "P"),
            (1_000_000_000_000, "T"),
            (1_000_000_000, "G"),
            (1_000_000, "M"),
            (1_000, "k"),
        ];
        match units.into_iter().find(|(unit, _)| self.0.is_multiple_of(*unit)) {
            Some((unit, name)) => write!(f, "{}{name}", self.0 / unit),
            None => write!(f, "{}", self.0),
        }
    }
}

/// What a rate has to be, for people.
pub const BOUNDS: &str = "a quantity of bits a second from 1k to 1P, like 10M";

/// A pod's limits, each none if there is none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Bandwidth {
    /// Of what it receives.
    pub ingress: Option<Rate>,
    /// Of what it sends.
    pub egress: Option<Rate>,
}

impl Bandwidth {
    /// Whether there is no limit.
    pub fn is_unlimited(&self) -> bool {
        *self == Self::default()
    }
}

impl fmt::Display for Bandwidth {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.ingress, self.egress) {
            (None, None) => f.write_str("no limit"),
            (Some(ingress), None) => write!(f, "receives {ingress}"),
            (None, Some(egress)) => write!(f, "sends {egress}"),
            (Some(ingress), Some(egress)) => write!(f, "receives {ingress}, sends {egress}"),
        }
    }
}

/// What an annotation asks for.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Asked {
    /// It is not there.
    #[default]
    Nothing,
    /// A limit.
    Limit(Rate),
    /// Something that is none, the beginning of it.
    Misunderstood(Box<str>),
}

impl Asked {
    fn of(annotations: &BTreeMap<String, String>, name: &str) -> Self {
        match annotations.get(name) {
            None => Self::Nothing,
            Some(text) => match Rate::parse(text) {
                Some(rate) => Self::Limit(rate),
                None => Self::Misunderstood(text.chars().take(KEPT).collect()),
            },
        }
    }

    /// What holds: `otherwise` where nothing is asked for, and what holds `now` where it is not understood.
    fn over(&self, now: Option<Rate>, otherwise: Option<Rate>) -> Option<Rate> {
        match self {
            Self::Nothing => otherwise,
            Self::Limit(rate) => Some(*rate),
            Self::Misunderstood(_) => now,
        }
    }
}

/// What a pod's annotations ask for.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct AskedBandwidth {
    /// Of what it receives.
    pub ingress: Asked,
    /// Of what it sends.
    pub egress: Asked,
}

impl AskedBandwidth {
    /// What an object's annotations ask for; none: nothing, as nearly always.
    pub fn of(annotations: Option<&BTreeMap<String, String>>) -> Option<Box<Self>> {
        let all = annotations?;
        let asked = Self {
            ingress: Asked::of(all, INGRESS_BANDWIDTH_ANNOTATION),
            egress: Asked::of(all, EGRESS_BANDWIDTH_ANNOTATION),
        };
        (asked != Self::default()).then(|| Box::new(asked))
    }

    /// The limits of a pod that has `now`, and `otherwise` where it asks for nothing.
    pub fn over(&self, now: Bandwidth, otherwise: Bandwidth) -> Bandwidth {
        Bandwidth {
            ingress: self.ingress.over(now.ingress, otherwise.ingress),
            egress: self.egress.over(now.egress, otherwise.egress),
        }
    }

    /// Of what somebody else asks for, what this leaves to them.
    pub fn leaves(&self, others: Bandwidth) -> Bandwidth {
        Bandwidth {
            ingress: others.ingress.filter(|_| self.ingress == Asked::Nothing),
            egress: others.egress.filter(|_| self.egress == Asked::Nothing),
        }
    }

    /// What is wrong with the annotations, in words.
    pub fn misunderstood(&self) -> impl Iterator<Item = String> {
        let both = [(INGRESS_BANDWIDTH_ANNOTATION, &self.ingress), (EGRESS_BANDWIDTH_ANNOTATION, &self.egress)];
        both.into_iter().filter_map(|(name, asked)| match asked {
            Asked::Misunderstood(text) => Some(format!("annotation {name}: {text:?} is not {BOUNDS}")),
            _ => None,
        })
    }
}

/// The value of a `resource.Quantity`, rounded up; none if it is none, negative, or too large for the type. Its grammar: a decimal number, and
/// after it nothing, a suffix of a power of ten (`n u m k M G T P E`) or of two (`Ki Mi Gi Ti Pi Ei`), or a decimal exponent.
fn quantity(text: &str) -> Option<u64> {
    let unsigned = text.strip_prefix('+').unwrap_or(text);
    let end = unsigned.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(unsigned.len());
    let (number, suffix) = unsigned.split_at_checked(end)?;
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    if whole.len() + fraction.len() == 0 || number.len() > DIGITS || fraction.contains('.') {
        return None;
    }
    // As a fraction: digits × 2^binary × 10^decimal.
    let digits = format!("{whole}{fraction}");
    let digits = digits.trim_start_matches('0');
    let (binary, exponent) = scale(suffix)?;
    let decimal = exponent.checked_sub(i32::try_from(fraction.len()).ok()?)?;
    if digits.is_empty() {
        return Some(0);
    }
    // Nothing that fits has more digits, before or behind its point, whatever its suffix.
    let length = i32::try_from(digits.len()).ok()?;
    if length.saturating_add(decimal) > 20 {
        return None;
    }
    if length.saturating_add(decimal) < -20 {
        return Some(1);
    }
    let (mut dividend, mut divisor) = (Vec::new(), 0_usize);
    dividend.extend(digits.bytes().map(|digit| digit - b'0'));
    match usize::try_from(decimal) {
        Ok(zeros) => dividend.extend(std::iter::repeat_n(0, zeros)),
        Err(_) => divisor = decimal.unsigned_abs() as usize,
    }
    rounded_up(&dividend, binary, divisor)
}

/// `digits` × 2^`binary` ÷ 10^`divisor`, rounded up.
fn rounded_up(digits: &[u8], binary: u32, divisor: usize) -> Option<u64> {
    let mut product = digits.to_vec();
    for _ in 0..binary {
        let mut carry = 0;
        for digit in product.iter_mut().rev() {
            let doubled = *digit * 2 + carry;
            (*digit, carry) = (doubled % 10, doubled / 10);
        }
        if carry > 0 {
            product.insert(0, carry);
        }
    }
    let (whole, rest) = product.split_at(product.len().saturating_sub(divisor));
    let value = whole.iter().try_fold(0_u64, |value, digit| value.checked_mul(10)?.checked_add(u64::from(*digit)))?;
    value.checked_add(u64::from(rest.iter().any(|digit| *digit > 0)))
}

/// Powers of two and of ten that a suffix stands for.
fn scale(suffix: &str) -> Option<(u32, i32)> {
    let power = |n: u32| Some((10 * n, 0));
    let decimal = |n: i32| Some((0, n));
    match suffix {
        "n" => decimal(-9),
        "u" => decimal(-6),
        "m" => decimal(-3),
        "" => decimal(0),
        "k" => decimal(3),
        "M" => decimal(6),
        "G" => decimal(9),
        "T" => decimal(12),
        "P" => decimal(15),
        "E" => decimal(18),
        "Ki" => power(1),
        "Mi" => power(2),
        "Gi" => power(3),
        "Ti" => power(4),
        "Pi" => power(5),
        "Ei" => power(6),
        exponent => {
            let number = exponent.strip_prefix(['e', 'E'])?;
            let digits = number.strip_prefix(['+', '-']).unwrap_or(number);
            if digits.is_empty() || digits.len() > 5 || !digits.bytes().all(|b| b.is_ascii_digit()) {
                return None;
            }
            decimal(number.parse().ok()?)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bits(text: &str) -> Option<u64> {
        Rate::parse(text).map(Rate::bits)
    }

    fn asked(ingress: Option<&str>, egress: Option<&str>) -> Option<Box<AskedBandwidth>> {
        let both = [(INGRESS_BANDWIDTH_ANNOTATION, ingress), (EGRESS_BANDWIDTH_ANNOTATION, egress)];
        let all = both.into_iter().filter_map(|(name, text)| Some((name.to_owned(), text?.to_owned()))).collect();
        AskedBandwidth::of(Some(&all))
    }

    #[test]
    fn quantities_are_read_as_kubernetes_reads_them() {
        for (text, value) in [
            ("1k", 1_000),
            ("1000", 1_000),
            ("+10M", 10_000_000),
            ("1Ki", 1_024),
            ("1.5Gi", 1_610_612_736),
            ("0.5M", 500_000),
            (".5M", 500_000),
            ("5.M", 5_000_000),
            ("010M", 10_000_000),
            ("2e6", 2_000_000),
            ("2E6", 2_000_000),
            ("2E+6", 2_000_000),
            ("20000e-1", 2_000),
            ("1500000m", 1_500),
            ("1000.0001", 1_001),
            ("1000000000001n", 1_001),
            ("1P", 1_000_000_000_000_000),
            ("0.001E", 1_000_000_000_000_000),
        ] {
            assert_eq!(quantity(text), Some(value), "{text}");
            assert_eq!(bits(text), (value >= 1_000).then_some(value), "{text}");
        }
        assert_eq!(quantity("0.000e5"), Some(0));
        assert_eq!(quantity("1e-99999"), Some(1), "rounded up");
    }

    #[test]
    fn what_is_no_rate_is_none() {
        let long = "9".repeat(1 << 16);
        for text in [
            "",
            "M",
            ".",
            "+",
            "-1M",
            "1 M",
            " 1M",
            "1M ",
            "1K",
            "1mi",
            "1Mbit",
            "1.2.3M",
            "1e",
            "1e+",
            "1e6M",
            "0x10",
            "1_000k",
            "ten",
            "1é",
            "∞",
            "1e999999999999",
            "1e99999",
            "99999999999999999999E",
            "999",
            "0",
            "1m",
            "1.1P",
            "1Pi",
            "1E",
            "999.9999e-1",
            &long,
        ] {
            assert_eq!(Rate::parse(text), None, "{text:?}");
        }
        assert_eq!(
            (bits("999.5"), bits("1000000000000000.1")),
            (Some(1_000), None),
            "rounded up, and then held against the bounds"
        );
    }

    #[test]
    fn a_rate_is_said_as_it_would_be_asked_for() {
        for text in ["1k", "8M", "1500k", "1001", "1G", "1P"] {
            assert_eq!(Rate::parse(text).map(|rate| rate.to_string()).as_deref(), Some(text));
        }
        assert_eq!(Rate::parse("1001").map(Rate::bytes), Some(126));
    }

    #[test]
    fn a_pod_without_annotations_asks_for_nothing_and_takes_no_room() {
        assert_eq!(asked(None, None), None);
        assert_eq!(AskedBandwidth::of(None), None);
        assert_eq!(size_of::<Option<Box<AskedBandwidth>>>(), 8);
    }

    #[test]
    fn annotations_come_first_then_what_else_was_said_and_nonsense_changes_nothing() {
        let rate = |text| Rate::parse(text);
        let now = Bandwidth { ingress: rate("1M"), egress: rate("2M") };
        let runtime = Bandwidth { ingress: rate("3M"), egress: rate("4M") };
        let both = asked(Some("5M"), None).unwrap();
        assert_eq!(both.over(now, runtime), Bandwidth { ingress: rate("5M"), egress: rate("4M") });
        assert_eq!(both.leaves(runtime), Bandwidth { ingress: None, egress: rate("4M") });
        let nonsense = asked(Some("5Mbit"), None).unwrap();
        assert_eq!(nonsense.over(now, Bandwidth::default()), Bandwidth { ingress: rate("1M"), egress: None });
        let said: Vec<String> = nonsense.misunderstood().collect();
        let expected = "annotation kubernetes.io/ingress-bandwidth: \"5Mbit\" is not a quantity of bits a second from 1k to 1P, like 10M";
        assert_eq!(said, [expected]);
    }

    #[test]
    fn of_what_is_not_understood_only_the_beginning_is_kept() {
        let Asked::Misunderstood(kept) = asked(None, Some(&"é".repeat(1 << 16))).unwrap().egress else {
            panic!("understood")
        };
        assert_eq!(kept.chars().count(), KEPT);
    }

    #[test]
    fn what_was_written_is_read_again_and_no_rate_out_of_bounds() {
        let limits = Bandwidth { ingress: Rate::parse("8M"), egress: None };
        let text = serde_json::to_string(&limits).unwrap();
        assert_eq!(text, r#"{"ingress":8000000,"egress":null}"#);
        assert_eq!(serde_json::from_str::<Bandwidth>(&text).unwrap(), limits);
        assert!(serde_json::from_str::<Bandwidth>(r#"{"ingress":999,"egress":null}"#).is_err());
    }
}
