//! Reads an object and leaves out who wrote which of its fields, which is often the larger half, without making anything of it.

use std::fmt;

use serde::de::{DeserializeSeed, Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Number, Value};

use crate::load_balancer::INGRESS_FIELD;

/// Where in an object what is being read stands.
#[derive(Clone, Copy, Debug)]
pub(super) enum Place {
    /// The object itself.
    Object,
    /// Its `metadata`.
    Metadata,
    /// `metadata.managedFields`, or what is not read wholly below: so many names lead on to [`INGRESS_FIELD`].
    Written(Written),
    /// Somewhere else: read as it is.
    Whole,
}

/// What is read of who wrote what.
#[derive(Clone, Copy, Debug)]
pub(super) enum Written {
    /// The list.
    All,
    /// One entry: its `manager`, and of `fieldsV1` what stands at [`INGRESS_FIELD`].
    Entry,
    /// So many names of [`INGRESS_FIELD`] are read.
    Field(usize),
}

impl Place {
    /// Where what has this name stands; none: it is left out.
    fn below(self, name: &str) -> Option<Self> {
        match (self, name) {
            (Self::Object, "metadata") => Some(Self::Metadata),
            (Self::Metadata, "managedFields") => Some(Self::Written(Written::All)),
            (Self::Written(Written::Entry), "fieldsV1") => Some(Self::Written(Written::Field(0))),
            (Self::Written(Written::Field(depth)), name) => {
                let mut names = INGRESS_FIELD.split('/').skip(1 + depth);
                let leads = names.next() == Some(name);
                let next = if names.next().is_some() { Self::Written(Written::Field(depth + 1)) } else { Self::Whole };
                leads.then_some(next)
            }
            (Self::Written(Written::Entry), "manager") | (Self::Object | Self::Metadata | Self::Whole, _) => {
                Some(Self::Whole)
            }
            (Self::Written(_), _) => None,
        }
    }

    /// Where an element of a list stands.
    fn element(self) -> Self {
        match self {
            Self::Written(Written::All) => Self::Written(Written::Entry),
            Self::Written(_) => self,
            _ => Self::Whole,
        }
    }
}

impl<'de> DeserializeSeed<'de> for Place {
    type Value = Value;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Value, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Place {
    type Value = Value;

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("any JSON")
    }

    fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
        Ok(Value::Bool(value))
    }

    fn visit_i64<E>(self, value: i64) -> Result<Value, E> {
        Ok(Value::Number(value.into()))
    }

    fn visit_u64<E>(self, value: u64) -> Result<Value, E> {
        Ok(Value::Number(value.into()))
    }

    fn visit_f64<E>(self, value: f64) -> Result<Value, E> {
        Ok(Number::from_f64(value).map_or(Value::Null, Value::Number))
    }

    fn visit_str<E>(self, value: &str) -> Result<Value, E> {
        Ok(Value::String(value.to_owned()))
    }

    fn visit_string<E>(self, value: String) -> Result<Value, E> {
        Ok(Value::String(value))
    }

    fn visit_none<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_some<D: Deserializer<'de>>(self, deserializer: D) -> Result<Value, D::Error> {
        self.deserialize(deserializer)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Value, A::Error> {
        let mut values = Vec::new();
        while let Some(value) = list.next_element_seed(self.element())? {
            values.push(value);
        }
        Ok(Value::Array(values))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Value, A::Error> {
        let mut values = Map::new();
        while let Some(name) = map.next_key::<String>()? {
            match self.below(&name) {
                Some(place) => drop(values.insert(name, map.next_value_seed(place)?)),
                None => drop(map.next_value::<IgnoredAny>()?),
            }
        }
        Ok(Value::Object(values))
    }
}
