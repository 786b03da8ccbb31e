//! Objects in protobuf, as clients made with client-go send them (`kubectl create deployment`, `kubectl create token` …).
//!
//! Only read, never written: such clients accept JSON in answers. A body is `k8s\0`, then a `runtime.Unknown` message with
//! the type and the object. Names of fields come from the table `protobuf.txt`, their types from the schemas, so that
//! the result is the object as JSON would have had it.

use std::collections::HashMap;
use std::sync::OnceLock;

use serde_json::{Map, Number, Value};

use super::schema::{Shape, Shapes, Type};
use super::table;

const MAGIC: &[u8] = b"k8s\0";
/// Deeper than any built-in type nests.
const DEEPEST: usize = 64;

/// Why a body is not an object, in words for the client.
type Malformed = String;

/// One field of a message.
enum Wire<'a> {
    Number(u64),
    Double(u64),
    Bytes(&'a [u8]),
}

/// Reads fields one after another.
struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn byte(&mut self) -> Result<u8, Malformed> {
        let (first, rest) = self.0.split_first().ok_or("unexpected EOF")?;
        self.0 = rest;
        Ok(*first)
    }

    fn varint(&mut self) -> Result<u64, Malformed> {
        let mut value = 0u64;
        for shift in (0..64).step_by(7) {
            let byte = self.byte()?;
            value |= u64::from(byte & 0x7f).checked_shl(shift).unwrap_or(0);
            if byte & 0x80 == 0 {
                return Ok(value);
            }
        }
        Err("proto: integer overflow".to_owned())
    }

    fn take(&mut self, count: u64) -> Result<&'a [u8], Malformed> {
        let count = usize::try_from(count).map_err(|_| "proto: negative length found during unmarshaling")?;
        let (head, tail) = self.0.split_at_checked(count).ok_or("unexpected EOF")?;
        self.0 = tail;
        Ok(head)
    }

    /// The next field's number and content; none at the end.
    fn next(&mut self) -> Result<Option<(u64, Wire<'a>)>, Malformed> {
        if self.0.is_empty() {
            return Ok(None);
        }
        let tag = self.varint()?;
        let content = match tag & 7 {
            0 => Wire::Number(self.varint()?),
            1 => {
                let bytes = self.take(8)?;
                Wire::Double(bytes.iter().rev().fold(0, |value, byte| value << 8 | u64::from(*byte)))
            }
            2 => {
                let length = self.varint()?;
                Wire::Bytes(self.take(length)?)
            }
            5 => Wire::Bytes(self.take(4)?),
            other => return Err(format!("proto: illegal wireType {other}")),
        };
        Ok(Some((tag >> 3, content)))
    }
}

/// A field as the table has it.
#[derive(Clone, Copy)]
enum Entry {
    /// Name, and whether a zero means something.
    Field(&'static str, bool),
    /// The fields of this message belong to the outer object.
    Inline(&'static str),
}

type Numbers = HashMap<&'static str, HashMap<u64, Entry>>;

fn numbers() -> &'static Numbers {
    static NUMBERS: OnceLock<Numbers> = OnceLock::new();
    NUMBERS.get_or_init(|| {
        let lines = include_str!("protobuf.txt").lines().filter(|line| !line.starts_with('#'));
        lines
            .filter_map(|line| line.split_once(' '))
            .map(|(name, fields)| {
                let mut next = 1u64;
                let entries = fields.split(' ').map(|word| {
                    let (number, word) = match word.split_once('=') {
                        Some((number, word)) => (number.parse().unwrap_or(next), word),
                        None => (next, word),
                    };
                    next = number.saturating_add(1);
                    let entry = match (word.strip_prefix('~'), word.strip_prefix('*')) {
                        (Some(message), _) => Entry::Inline(message),
                        (None, Some(name)) => Entry::Field(name, true),
                        (None, None) => Entry::Field(word, false),
                    };
                    (number, entry)
                });
                (name, entries.collect())
            })
            .collect()
    })
}

/// The object in a protobuf body, as JSON; an error says what is wrong with the body.
pub(crate) fn decode(body: &[u8]) -> Result<Value, Malformed> {
    let message =
        body.strip_prefix(MAGIC).ok_or("provided data does not appear to be a protobuf message, expected prefix")?;
    let (mut api_version, mut kind, mut raw) = (String::new(), String::new(), &[][..]);
    let mut reader = Reader(message);
    while let Some((number, content)) = reader.next()? {
        match (number, content) {
            (1, Wire::Bytes(bytes)) => {
                let mut meta = Reader(bytes);
                while let Some((number, content)) = meta.next()? {
                    match (number, content) {
                        (1, Wire::Bytes(text)) => api_version = utf8(text)?.to_owned(),
                        (2, Wire::Bytes(text)) => kind = utf8(text)?.to_owned(),
                        _ => {}
                    }
                }
            }
            (2, Wire::Bytes(bytes)) => raw = bytes,
            _ => {}
        }
    }
    let shape = root(&api_version, &kind)
        .ok_or_else(|| format!("no kind \"{kind}\" is registered for version \"{api_version}\" in protobuf"))?;
    let mut object = Map::new();
    object.insert("kind".to_owned(), kind.into());
    object.insert("apiVersion".to_owned(), api_version.into());
    fields(raw, shape, short(&shape.name), &mut object, 0)?;
    Ok(Value::Object(object))
}

/// The type of a message by what it says of itself.
fn root(api_version: &str, kind: &str) -> Option<&'static Type> {
    let shapes = Shapes::get();
    let (group, version) = api_version.split_once('/').unwrap_or(("", api_version));
    let row = table::ROWS.iter().find(|row| row.group == group && row.version == version && row.kind == kind);
    let name = match (row, kind) {
        (Some(row), _) => row.schema,
        (None, "DeleteOptions") => "io.k8s.apimachinery.pkg.apis.meta.v1.DeleteOptions",
        (None, "Eviction") => "io.k8s.api.policy.v1.Eviction",
        (None, "TokenRequest") => "io.k8s.api.authentication.v1.TokenRequest",
        (None, "Scale") => "io.k8s.api.autoscaling.v1.Scale",
        _ => return None,
    };
    shapes.named(name)
}

/// `core.v1.Pod` of `io.k8s.api.core.v1.Pod`.
fn short(name: &str) -> &str {
    let mut dots = name.rmatch_indices('.').map(|(place, _)| place).skip(2);
    dots.next().and_then(|place| name.get(place + 1..)).unwrap_or(name)
}

fn utf8(bytes: &[u8]) -> Result<&str, Malformed> {
    std::str::from_utf8(bytes).map_err(|_| "proto: a text is not UTF-8".to_owned())
}

/// Reads a message of the table's type `message` into `object`, whose fields are those of `shape`.
fn fields(
    bytes: &[u8],
    shape: &Type,
    message: &str,
    object: &mut Map<String, Value>,
    depth: usize,
) -> Result<(), Malformed> {
    if depth > DEEPEST {
        return Err("proto: nesting too deep".to_owned());
    }
    let known = numbers().get(message);
    let mut reader = Reader(bytes);
    while let Some((number, content)) = reader.next()? {
        match known.and_then(|known| known.get(&number)).copied() {
            Some(Entry::Inline(inner)) => {
                if let Wire::Bytes(bytes) = content {
                    fields(bytes, shape, inner, object, depth + 1)?;
                }
            }
            Some(Entry::Field(name, keep_zero)) => {
                if let Some(field) = shape.field(name) {
                    self::field(name, &field.shape, keep_zero, content, object, depth)?;
                }
            }
            None => {}
        }
    }
    Ok(())
}

fn field(
    name: &str,
    shape: &Shape,
    keep_zero: bool,
    content: Wire<'_>,
    object: &mut Map<String, Value>,
    depth: usize,
) -> Result<(), Malformed> {
    match shape {
        Shape::List(item) => {
            let list = object.entry(name).or_insert_with(|| Value::Array(Vec::new()));
            if let (Some(value), Some(list)) = (value(item, content, depth)?, list.as_array_mut()) {
                list.push(value);
            }
        }
        Shape::Map(item) => {
            let Wire::Bytes(bytes) = content else { return Ok(()) };
            let (mut key, mut entry) = (String::new(), None);
            let mut reader = Reader(bytes);
            while let Some((number, content)) = reader.next()? {
                match (number, content) {
                    (1, Wire::Bytes(text)) => key = utf8(text)?.to_owned(),
                    (2, content) => entry = value(item, content, depth)?,
                    _ => {}
                }
            }
            let map = object.entry(name).or_insert_with(|| Value::Object(Map::new()));
            if let Some(map) = map.as_object_mut() {
                map.insert(key, entry.unwrap_or_else(|| Value::from("")));
            }
        }
        _ => {
            if let Some(value) = value(shape, content, depth)?
                && (keep_zero || !is_zero(&value))
            {
                object.insert(name.to_owned(), value);
            }
        }
    }
    Ok(())
}

/// Whether Go would leave the value out of JSON unless it is behind a pointer.
fn is_zero(value: &Value) -> bool {
    match value {
        Value::String(text) => text.is_empty(),
        Value::Bool(flag) => !flag,
        Value::Number(number) => number.as_i64() == Some(0),
        _ => false,
    }
}

fn value(shape: &Shape, content: Wire<'_>, depth: usize) -> Result<Option<Value>, Malformed> {
    use base64::Engine;
    Ok(match (shape, content) {
        (Shape::Text, Wire::Bytes(bytes)) => Some(Value::from(utf8(bytes)?)),
        (Shape::Bytes, Wire::Bytes(bytes)) => {
            Some(Value::from(base64::engine::general_purpose::STANDARD.encode(bytes)))
        }
        (Shape::Flag, Wire::Number(number)) => Some(Value::from(number != 0)),
        // Negative numbers are sign-extended to 64 bits on the wire.
        (Shape::Int32 | Shape::Int64, Wire::Number(number)) => Some(Value::from(number.cast_signed())),
        (Shape::Float, Wire::Double(bits)) => Number::from_f64(f64::from_bits(bits)).map(Value::Number),
        (Shape::Quantity, Wire::Bytes(bytes)) => {
            let text = texts(bytes, 1)?.pop().unwrap_or_default();
            Some(Value::from(if text.is_empty() { "0".to_owned() } else { text }))
        }
        (Shape::IntOrText, Wire::Bytes(bytes)) => Some(int_or_text(bytes)?),
        (Shape::Time, Wire::Bytes(bytes)) => time(bytes)?.map(Value::from),
        (Shape::Any, Wire::Bytes(bytes)) => raw_json(bytes)?,
        // A list as the value of a map is a message that holds the items.
        (Shape::List(item), Wire::Bytes(bytes)) if **item == Shape::Text => Some(Value::from(texts(bytes, 1)?)),
        (Shape::Object(place), Wire::Bytes(bytes)) => match Shapes::get().at(*place) {
            Some(inner) => {
                let mut object = Map::new();
                fields(bytes, inner, short(&inner.name), &mut object, depth + 1)?;
                Some(Value::Object(object))
            }
            None => None,
        },
        _ => return Err("proto: wrong wireType for a field".to_owned()),
    })
}

/// All texts with this field number.
fn texts(bytes: &[u8], wanted: u64) -> Result<Vec<String>, Malformed> {
    let mut out = Vec::new();
    let mut reader = Reader(bytes);
    while let Some((number, content)) = reader.next()? {
        if let (true, Wire::Bytes(text)) = (number == wanted, content) {
            out.push(utf8(text)?.to_owned());
        }
    }
    Ok(out)
}

fn int_or_text(bytes: &[u8]) -> Result<Value, Malformed> {
    let (mut is_text, mut number, mut text) = (false, 0, String::new());
    let mut reader = Reader(bytes);
    while let Some((field, content)) = reader.next()? {
        match (field, content) {
            (1, Wire::Number(kind)) => is_text = kind == 1,
            (2, Wire::Number(value)) => number = value.cast_signed(),
            (3, Wire::Bytes(bytes)) => text = utf8(bytes)?.to_owned(),
            _ => {}
        }
    }
    Ok(if is_text { Value::from(text) } else { Value::from(number) })
}

/// A time as RFC 3339; none for the zero time, an empty message.
fn time(bytes: &[u8]) -> Result<Option<String>, Malformed> {
    let (mut seconds, mut nanos) = (None, 0i64);
    let mut reader = Reader(bytes);
    while let Some((field, content)) = reader.next()? {
        match (field, content) {
            (1, Wire::Number(value)) => seconds = Some(value.cast_signed()),
            (2, Wire::Number(value)) => nanos = value.cast_signed(),
            _ => {}
        }
    }
    let Some(seconds) = seconds else { return Ok(None) };
    let nanos = i32::try_from(nanos).unwrap_or(0);
    let time =
        jiff::Timestamp::new(seconds, nanos).map_err(|error| format!("proto: a time is out of range: {error}"))?;
    Ok(Some(if nanos == 0 { time.to_string() } else { format!("{time:.6}") }))
}

/// Embedded JSON (`RawExtension`, managed fields).
fn raw_json(bytes: &[u8]) -> Result<Option<Value>, Malformed> {
    let mut reader = Reader(bytes);
    while let Some((field, content)) = reader.next()? {
        if let (1, Wire::Bytes(json)) = (field, content) {
            return serde_json::from_slice(json).map(Some).map_err(|error| format!("embedded JSON: {error}"));
        }
    }
    Ok(None)
}
