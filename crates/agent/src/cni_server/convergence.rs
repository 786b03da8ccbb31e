//! What is queued gets done, and leases follow the devices that really exist.

use super::CniServerError;
use super::operations::Operations;
use super::ports::{Device, PlumbError, PodIndex, PodPlumber};
use crate::ipam::Lease;

impl<I: PodIndex, P: PodPlumber> Operations<I, P> {
    /// Does what is queued, then compares leases with devices. What fails is tried again at the next sweep.
    pub async fn sweep(&self) {
        self.drain_queue().await;
        if let Err(error) = self.reconcile().await {
            tracing::warn!(%error, "leases and devices could not be compared; tried again");
        }
    }

    /// Works off queued DELs.
    pub async fn drain_queue(&self) {
        let queued = match self.queue.list() {
            Ok(queued) => queued,
            Err(error) => {
                tracing::warn!(dir = %self.settings.deletes.display(), %error, "cannot read the queue of DELs; tried again");
                return;
            }
        };
        for owner in queued {
            let _turn = self.turns.take(&owner).await;
            if !self.queue.contains(&owner) {
                continue;
            }
            match self.remove(&owner).await {
                Ok(()) => tracing::info!(attachment = %owner, "a queued DEL is done"),
                Err(error) => tracing::warn!(attachment = %owner, %error, "a queued DEL failed; tried again"),
            }
        }
    }

    /// Compares leases with the devices that exist: releases what has none, removes what no ADD answered for, holds the
    /// addresses of devices without a lease.
    pub async fn reconcile(&self) -> Result<(), CniServerError> {
        let found = self.leases.compare(&self.devices().await?, |owner| self.plumber.device_name(owner));
        for lease in &found.unanswered {
            let _turn = self.turns.take(&lease.owner).await;
            self.remove_if_unchanged(lease, "its ADD was never answered").await;
        }
        for lease in &found.without_device {
            let _turn = self.turns.take(&lease.owner).await;
            // Looked at again in its turn: it may have been removed and made again meanwhile.
            let name = self.plumber.device_name(&lease.owner);
            if !self.devices().await?.iter().any(|d| d.name == name) {
                self.remove_if_unchanged(lease, "its network namespace is gone").await;
            }
        }
        for owner in &found.damaged_gone {
            let _turn = self.turns.take(owner).await;
            if self.leases.lease(owner).is_none()
                && let Err(error) = self.remove(owner).await
            {
                tracing::warn!(attachment = %owner, %error, "a damaged lease cannot be removed; tried again");
            }
        }
        let strangers = if found.strangers.is_empty() {
            Vec::new()
        } else {
            let devices = self.devices().await?;
            let again = self.leases.compare(&devices, |owner| self.plumber.device_name(owner)).strangers;
            again.into_iter().filter(|d| found.strangers.iter().any(|before| before.name == d.name)).collect()
        };
        self.leases.hold(&strangers);
        Ok(())
    }

    async fn remove_if_unchanged(&self, lease: &Lease, why: &str) {
        if self.leases.lease(&lease.owner).as_ref() != Some(lease) {
            return;
        }
        match self.remove(&lease.owner).await {
            Ok(()) => tracing::info!(attachment = %lease.owner, addresses = ?lease.addresses, why, "released"),
            Err(error) => tracing::warn!(attachment = %lease.owner, why, %error, "cannot be released; tried again"),
        }
    }

    async fn devices(&self) -> Result<Vec<Device>, CniServerError> {
        match tokio::time::timeout(self.settings.detach_wait, self.plumber.list()).await {
            Ok(devices) => devices.map_err(CniServerError::Devices),
            Err(_) => Err(CniServerError::Devices(PlumbError::Again("listing them took too long".to_owned()))),
        }
    }
}
