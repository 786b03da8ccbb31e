//! The shape of every built-in type: fields, their types and how they merge.
//!
//! Made once, when first asked for, from the schemas of `k8s-openapi` and the merge table; descriptions are not kept,
//! because the shapes stay in memory for the life of the process.

use std::collections::HashMap;
use std::sync::OnceLock;

use schemars::SchemaGenerator;
use schemars::generate::SchemaSettings;
use serde_json::Value;

use super::merge::MergeTable;
use super::read::Read;
use super::table::{self, Root};
use crate::resource::FieldMerge;

/// What a field holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Shape {
    /// Any JSON.
    Any,
    /// Text.
    Text,
    /// Base64.
    Bytes,
    /// RFC 3339 time.
    Time,
    /// Truth value.
    Flag,
    /// 32-bit integer.
    Int32,
    /// 64-bit integer.
    Int64,
    /// Floating point.
    Float,
    /// A number or text (ports, percentages).
    IntOrText,
    /// A quantity such as `100m`.
    Quantity,
    /// A list of these.
    List(Box<Shape>),
    /// A map from text to these.
    Map(Box<Shape>),
    /// An object of the type with this index.
    Object(usize),
}

/// One field of a type.
#[derive(Clone, Debug)]
pub(crate) struct Field {
    /// Name in JSON.
    pub(crate) name: Box<str>,
    /// What it holds.
    pub(crate) shape: Shape,
    /// Whether the schema lists it as required.
    pub(crate) required: bool,
    /// How it merges.
    pub(crate) merge: FieldMerge,
}

/// One type.
#[derive(Clone, Debug)]
pub(crate) struct Type {
    /// `io.k8s.api.core.v1.Pod`.
    pub(crate) name: Box<str>,
    /// Fields, ordered by name.
    pub(crate) fields: Vec<Field>,
}

impl Type {
    /// The field of this name.
    pub(crate) fn field(&self, name: &str) -> Option<&Field> {
        let place = self.fields.binary_search_by(|field| field.name.as_ref().cmp(name)).ok()?;
        self.fields.get(place)
    }

    /// The name of the Go type without its package: `Pod`.
    pub(crate) fn short_name(&self) -> &str {
        self.name.rsplit('.').next().unwrap_or_default()
    }

    /// The name of the Go type with its package: `v1.Pod`.
    pub(crate) fn go_name(&self) -> &str {
        let mut dots = self.name.rmatch_indices('.').map(|(place, _)| place).skip(1);
        dots.next().and_then(|place| self.name.get(place + 1..)).unwrap_or(&self.name)
    }
}

/// All types.
#[derive(Debug, Default)]
pub(crate) struct Shapes {
    types: Vec<Type>,
    index: HashMap<Box<str>, usize>,
}

impl Shapes {
    /// The shapes of all built-in types.
    pub(crate) fn get() -> &'static Shapes {
        static SHAPES: OnceLock<Shapes> = OnceLock::new();
        SHAPES.get_or_init(|| {
            let mut shapes = Shapes::default();
            let merge = MergeTable::read();
            let mut roots: Vec<Root> = table::ROWS.iter().map(|row| row.root).collect();
            roots.push(|generator| {
                generator.subschema_for::<k8s_openapi::api::autoscaling::v1::Scale>();
                generator.subschema_for::<k8s_openapi::api::authentication::v1::TokenRequest>();
                generator.subschema_for::<k8s_openapi::api::policy::v1::Eviction>();
                generator.subschema_for::<k8s_openapi::apimachinery::pkg::apis::meta::v1::DeleteOptions>();
            });
            for root in roots {
                shapes.add(root, &merge);
            }
            shapes
        })
    }

    /// The type of this full name.
    pub(crate) fn named(&self, name: &str) -> Option<&Type> {
        self.index.get(name).and_then(|place| self.types.get(*place))
    }

    /// The type with this index.
    pub(crate) fn at(&self, place: usize) -> Option<&Type> {
        self.types.get(place)
    }

    fn add(&mut self, root: Root, merge: &MergeTable) {
        let mut generator = generator();
        root(&mut generator);
        let definitions = generator.take_definitions(true);
        let fresh: Vec<(&String, &Value)> =
            definitions.iter().filter(|(name, _)| !self.index.contains_key(name.as_str())).collect();
        for (name, _) in &fresh {
            self.index.insert(name.as_str().into(), self.types.len());
            self.types.push(Type { name: name.as_str().into(), fields: Vec::new() });
        }
        for (name, definition) in fresh {
            let fields = self.fields(name, definition, &definitions, merge);
            if let Some(kind) = self.index.get(name.as_str()).copied().and_then(|place| self.types.get_mut(place)) {
                kind.fields = fields;
            }
        }
    }

    fn fields(
        &self,
        owner: &str,
        definition: &Value,
        all: &serde_json::Map<String, Value>,
        merge: &MergeTable,
    ) -> Vec<Field> {
        let required = definition.texts("required");
        let mut fields: Vec<Field> = definition
            .entries("properties")
            .map(|(name, schema)| {
                let shape = self.shape(schema, all);
                let target = match &shape {
                    Shape::Object(place) => self.at(*place).map(|target| &*target.name),
                    _ => None,
                };
                Field {
                    name: name.as_str().into(),
                    merge: merge.field(owner, name, target, matches!(shape, Shape::List(_))),
                    required: required.contains(&name.as_str()),
                    shape,
                }
            })
            .collect();
        fields.sort_by(|a, b| a.name.cmp(&b.name));
        fields
    }

    fn shape(&self, schema: &Value, all: &serde_json::Map<String, Value>) -> Shape {
        if let Some(name) = reference(schema) {
            return match name {
                "io.k8s.apimachinery.pkg.api.resource.Quantity" => Shape::Quantity,
                "io.k8s.apimachinery.pkg.util.intstr.IntOrString" => Shape::IntOrText,
                _ => match (all.get(name), self.index.get(name)) {
                    (Some(target), Some(place)) if target.has("properties") => Shape::Object(*place),
                    (Some(target), _) => self.shape(target, all),
                    _ => Shape::Any,
                },
            };
        }
        match (schema.text("type"), schema.text("format")) {
            ("string", "byte") => Shape::Bytes,
            ("string", "date-time") => Shape::Time,
            ("string", _) => Shape::Text,
            ("boolean", _) => Shape::Flag,
            ("integer", "int64") => Shape::Int64,
            ("integer", _) => Shape::Int32,
            ("number", _) => Shape::Float,
            ("array", _) => Shape::List(Box::new(self.shape(schema.at("items"), all))),
            ("object", _) if schema.at("additionalProperties").is_object() => {
                Shape::Map(Box::new(self.shape(schema.at("additionalProperties"), all)))
            }
            _ => Shape::Any,
        }
    }
}

/// The name that a schema refers to.
pub(crate) fn reference(schema: &Value) -> Option<&str> {
    let target = match schema.at("$ref").as_str() {
        Some(target) => target,
        None => schema.list("allOf").first()?.at("$ref").as_str()?,
    };
    target.rsplit('/').next()
}

/// A generator whose definitions are named as in Kubernetes' OpenAPI documents.
pub(crate) fn generator() -> SchemaGenerator {
    SchemaSettings::draft2020_12()
        .with(|settings| {
            settings.meta_schema = None;
            settings.inline_subschemas = false;
        })
        .into_generator()
}
