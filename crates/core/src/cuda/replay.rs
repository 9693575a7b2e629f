//! Running a plan: its kernels are captured into a CUDA graph at the first run with some memory, and replayed later.

use std::sync::{Mutex, MutexGuard, PoisonError};

use cudarc::driver::sys;

use super::{Cuda, Launcher, check};
use crate::error::Error;
use crate::plan::Plan;

/// Captured runs that a plan keeps: one for each set of addresses that it is used with.
const KEPT: usize = 8;

/// The captured runs of a plan.
#[derive(Debug, Default)]
pub struct Captured(Mutex<Vec<Capture>>);

#[derive(Debug)]
struct Capture {
    /// The arena and the bound memory.
    addresses: Vec<u64>,
    graph: sys::CUgraphExec,
}

// SAFETY: the driver's handles may be used from any thread.
unsafe impl Send for Capture {}

impl Drop for Capture {
    fn drop(&mut self) {
        // SAFETY: made by the driver and destroyed once; the driver waits for runs under way.
        unsafe { sys::cuGraphExecDestroy(self.graph) };
    }
}

impl Cuda {
    /// Enqueues a run of a plan.
    pub(crate) fn run(&self, plan: &Plan, arena: *mut u8, externals: &[*mut u8]) -> Result<(), Error> {
        let kept = self.captured(plan, arena, externals)?;
        let Some(capture) = kept.last() else { return Ok(()) };
        let _turn = self.turn();
        // SAFETY: the graph is instantiated, and the memory that it uses was checked by the caller.
        check("running a plan", unsafe { sys::cuGraphLaunch(capture.graph, self.stream()) })
    }

    /// Captures a run of a plan with this memory, if that was not done yet.
    pub(crate) fn prepare(&self, plan: &Plan, arena: *mut u8, externals: &[*mut u8]) -> Result<(), Error> {
        self.captured(plan, arena, externals).map(drop)
    }

    /// The captured runs of a plan, the one with this memory at the end.
    fn captured<'a>(
        &self,
        plan: &'a Plan,
        arena: *mut u8,
        externals: &[*mut u8],
    ) -> Result<MutexGuard<'a, Vec<Capture>>, Error> {
        self.take_fault()?;
        self.bind()?;
        let addresses: Vec<u64> = externals.iter().chain([&arena]).map(|p| *p as u64).collect();
        let mut kept = plan.captured().0.lock().unwrap_or_else(PoisonError::into_inner);
        match kept.iter().position(|c| c.addresses == addresses) {
            Some(at) => kept[at..].rotate_left(1),
            None => {
                let graph = self.capture(plan, arena, externals)?;
                if kept.len() == KEPT {
                    kept.remove(0);
                }
                kept.push(Capture { addresses, graph });
            }
        }
        Ok(kept)
    }

    fn capture(&self, plan: &Plan, arena: *mut u8, externals: &[*mut u8]) -> Result<sys::CUgraphExec, Error> {
        let mut collector = Launcher::collect(self.properties());
        plan.run_cuda(&mut collector, arena, externals)?;
        self.kernels().prepare(&collector.variants())?;
        self.blas().prepare(self)?;
        let _turn = self.turn();
        // SAFETY: the stream is ours; a capture that was begun is ended whatever happens in between.
        unsafe {
            let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED;
            check("capturing a plan", sys::cuStreamBeginCapture_v2(self.stream(), mode))?;
            let written = plan.run_cuda(&mut Launcher::run(self), arena, externals);
            let mut graph = std::ptr::null_mut();
            let ended = check("capturing a plan", sys::cuStreamEndCapture(self.stream(), &mut graph));
            written?;
            ended?;
            let mut exec = std::ptr::null_mut();
            let made = check("instantiating a plan", sys::cuGraphInstantiateWithFlags(&mut exec, graph, 0));
            sys::cuGraphDestroy(graph);
            made.map(|()| exec)
        }
    }
}
