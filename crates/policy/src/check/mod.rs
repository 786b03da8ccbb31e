//! The translation check: an image is read as the kernel will read it, and must say what the policies say.
//!
//! It covers every pod of the node, every class of peers and every port of every protocol, not samples of them: peers are cut where any
//! policy in force on the node or any prefix of the image tells two of them apart, and ports are compared as sets. What the policies say
//! is read from their [clauses](crate::verify), not from what the compiler made of them; the two share only who holds which
//! address ([`Holders`](crate::Holders)). The tests hold the check against flows that are judged one by one, and break images to see that it notices.
//!
//! A [`Checker`] keeps what it read, of policies, peers and the image, and after a change compares what is no longer as it was. What that is
//! it takes from the objects that changed, as whoever watches them says, and from what is told to the kernel; never from what the compiler
//! thinks of the one or holds of the other. So a compiler that misses a change does not have it missed here. What is kept is bounded:
//! some 200 bytes an address of the cluster, 1 to 2 KiB a set of labels that pods have, what the policies in force on the node say and a
//! copy of the image's maps (530 bytes a pod in all, where ten pods share their labels); and of what is no longer there about as much
//! again, before everything is read anew.

mod claims;
mod compare;
mod effort;
mod line;
mod matchers;
mod peers;
mod program;
mod reading;
mod reads;
mod rows;
mod texts;
mod written;

use std::fmt;
use std::net::IpAddr;

use towpath_model::desired::{PolicyChanges, PolicyImage, RowProtocol, Verdict};
use towpath_model::{Direction, NamespacedName, NodeName};

use self::effort::TooMuch;
use self::reading::Reading;
use crate::compile::Touched;
use crate::evaluate::{Flow, Side};
use crate::view::View;

/// What a check that found nothing looked at.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Checked {
    /// Kinds of pods of the node, by direction, of which something was compared: those that the same policies select.
    pub subjects: usize,
    /// Everything was read anew.
    pub anew: bool,
    /// Sets of ports that were compared.
    pub compared: usize,
}

/// An image does not say what the policies say, or nobody knows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Mismatch {
    /// A pod of the node is not in the image.
    Missing {
        /// The pod.
        pod: NamespacedName,
        /// Its address.
        address: IpAddr,
    },
    /// The image has a pod at an address that is none of this node's.
    Surplus {
        /// The address.
        address: IpAddr,
    },
    /// What is told to the kernel does not make the compiled image of what it had.
    Untold,
    /// The policies tell more apart than is checked; whether the image does is not known.
    TooLarge,
    /// A flow is judged otherwise.
    Flow {
        /// The pod whose policies are asked.
        pod: NamespacedName,
        /// The direction.
        direction: Direction,
        /// The flow; others may be judged otherwise too.
        flow: Flow,
        /// What the image says.
        image: Verdict,
        /// What the policies say, with the reason.
        policies: Option<Box<Side>>,
    },
}

impl fmt::Display for Mismatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Mismatch::Missing { pod, address } => {
                write!(f, "pod {pod} ({address}) has no policy in the compiled image, not even an open one")
            }
            Mismatch::Surplus { address } => {
                write!(f, "the compiled image has a pod at {address}, where this node has none")
            }
            Mismatch::Untold => {
                write!(f, "the changes that were told to the kernel do not make the compiled image of the one before")
            }
            Mismatch::TooLarge => f.write_str(
                "the policies that select pods of this node are too large to be checked (peers times rules): look for thousands of \
                 rules that each speak of the same addresses",
            ),
            Mismatch::Flow { pod, direction, flow, image, policies } => {
                let (asked, said) = match direction {
                    Direction::Ingress => (flow.source, "to reach"),
                    Direction::Egress => (flow.destination, "to be reached by"),
                };
                let image = if *image == Verdict::Allow { "allows" } else { "denies" };
                write!(f, "the compiled image {image} {asked} {said} pod {pod} on ")?;
                match flow.protocol {
                    RowProtocol::Ports(protocol) => write!(f, "{protocol} {}", flow.port)?,
                    RowProtocol::Other => f.write_str("protocols without ports")?,
                }
                match policies {
                    Some(side) => write!(f, ", the policies say: {side}"),
                    None => f.write_str(", the policies otherwise"),
                }
            }
        }
    }
}

impl std::error::Error for Mismatch {}

impl From<TooMuch> for Box<Mismatch> {
    fn from(_: TooMuch) -> Self {
        Box::new(Mismatch::TooLarge)
    }
}

/// Checks an image of `node` against the policies of the view that it was compiled from.
///
/// # Errors
/// The first flow that the two judge differently, or a pod that only one of them knows.
pub fn check(view: &View<'_>, node: &NodeName, image: &PolicyImage) -> Result<Checked, Box<Mismatch>> {
    Reading::of(view, node, image)?.compare_all(view)
}

/// Checks the images of one node, one after another.
#[derive(Clone, Debug)]
pub struct Checker {
    node: NodeName,
    /// None: nothing was checked yet, or what was differed.
    reading: Option<Reading>,
}

impl Checker {
    /// One that has read nothing yet.
    pub fn new(node: NodeName) -> Self {
        Self { node, reading: None }
    }

    /// Reads everything anew, and checks all of an image.
    ///
    /// # Errors
    /// As [`check`].
    pub fn check(&mut self, view: &View<'_>, image: &PolicyImage) -> Result<Checked, Box<Mismatch>> {
        self.reading = None;
        let mut reading = Reading::of(view, &self.node, image)?;
        let checked = reading.compare_all(view)?;
        self.reading = Some(reading);
        Ok(checked)
    }

    /// Checks what is no longer as it was when the image before was checked: `touched` are the objects that may have changed since, and
    /// `changes` what the kernel is told; none: the whole `image`, which is then checked wholly. Of addresses that the node gave, of DNS and of
    /// domain names it finds out by itself.
    ///
    /// Without mention of what changed it reads everything, too, and compares `image` with what it has of it.
    ///
    /// # Errors
    /// As [`check`]; or the changes do not make the image. After either the next check reads everything anew.
    pub fn follow(
        &mut self,
        view: &View<'_>,
        image: &PolicyImage,
        changes: Option<&PolicyChanges>,
        touched: &Touched,
    ) -> Result<Checked, Box<Mismatch>> {
        let (Some(mut reading), Some(changes)) = (self.reading.take(), changes) else { return self.check(view, image) };
        let news = reading.follow(view, &self.node, changes, touched)?;
        let Some(news) = news else {
            if !reading.has(image) {
                return Err(Box::new(Mismatch::Untold));
            }
            return self.check(view, image);
        };
        let checked = reading.compare_news(&news, view)?;
        self.reading = Some(reading);
        Ok(checked)
    }

    /// Whether what is kept was read from this image, with all changes since: what the kernel has been told.
    pub fn has(&self, image: &PolicyImage) -> bool {
        self.reading.as_ref().is_none_or(|reading| reading.has(image))
    }
}
