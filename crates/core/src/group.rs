//! Devices that compute together, each driven by a thread of its own: sums over all of them.
//!
//! GPUs sum through NCCL, on a stream beside the one that computes. CPUs of one process sum in memory, in the order of
//! the ranks: that is the contract in the simplest form, and how training on several devices is tested without them.

use std::sync::Arc;

use crate::cuda::nccl::Communicator;
use crate::device::Device;
use crate::error::Error;
use crate::meeting::Meeting;

/// A device's membership in a group.
#[derive(Debug)]
pub struct Member {
    rank: usize,
    count: usize,
    sums: Sums,
}

#[derive(Debug)]
enum Sums {
    Host(Arc<Meeting<Vec<f32>>>),
    Nccl(Communicator),
}

impl Member {
    /// Makes a group of these devices, all of one kind and no two of them the same GPU. Needs NCCL for GPUs.
    ///
    /// # Errors
    /// Devices of several kinds; NCCL is missing or refuses.
    pub fn group(devices: &[Device]) -> Result<Vec<Member>, Error> {
        let gpus: Vec<_> = devices
            .iter()
            .filter_map(|d| match d {
                Device::Cuda(cuda) => Some(cuda.clone()),
                Device::Cpu(_) => None,
            })
            .collect();
        let count = devices.len();
        let sums: Vec<Sums> = if gpus.is_empty() {
            let meeting = Arc::new(Meeting::new(count));
            devices.iter().map(|_| Sums::Host(meeting.clone())).collect()
        } else if gpus.len() == count {
            Communicator::group(&gpus)?.into_iter().map(Sums::Nccl).collect()
        } else {
            let message = "a CPU and a GPU cannot sum with each other".into();
            return Err(Error::Unsupported { op: "all_reduce", message });
        };
        Ok(sums.into_iter().enumerate().map(|(rank, sums)| Member { rank, count, sums }).collect())
    }

    /// Its number in the group, from 0.
    pub fn rank(&self) -> usize {
        self.rank
    }

    /// Members of the group.
    pub fn count(&self) -> usize {
        self.count
    }

    /// Gives up: sums that wait for other members end with garbage, and nothing can be summed any more. Every member
    /// of a group that broke calls this before it frees memory.
    pub fn leave(&self) {
        match &self.sums {
            Sums::Host(meeting) => meeting.leave(),
            Sums::Nccl(communicator) => communicator.abort(),
        }
    }

    /// The numbers of all members, if they are summed in the CPU's memory.
    pub(crate) fn on_host(&self) -> Option<&Meeting<Vec<f32>>> {
        match &self.sums {
            Sums::Host(meeting) => Some(meeting),
            Sums::Nccl(_) => None,
        }
    }

    /// What sums in the memory of GPUs.
    pub(crate) fn on_gpu(&self) -> Option<&Communicator> {
        match &self.sums {
            Sums::Host(_) => None,
            Sums::Nccl(communicator) => Some(communicator),
        }
    }
}
