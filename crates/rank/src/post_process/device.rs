//! Post-processing on a device: enqueues a finish on the complete parameters of one rank.

use std::{collections::HashMap, sync::Arc};

use longshore_kernels::{
    cuda::{
        driver::{CudaError, Device, DeviceMemory, Event, Stream},
        launch::{self, MlaWeight, Permutation, Permutations, Reorder, Workspace, WorkspaceBytes},
        scalars::{Experts, KvScales as KvKernel, Linear},
        table,
    },
    host::mla::Dims,
};
use longshore_models::{
    declare::ParamId,
    placement::Placement,
    quant::Scheme,
    transform::{ExpertScalars, Finish, KvScales, LinearScalars, MlaSplit},
};

use super::contradiction;
use crate::{error::RankError, params::ParamMemory};

/// More workspace than this is not taken where less does: a launch then takes one part after the other.
const WORKSPACE_BYTES_MAX: u64 = 64 << 20;

/// Bytes of device memory that the finishes of one rank work in, beside the parameters.
pub fn workspace_bytes(placement: &Placement, device: table::Device) -> u64 {
    let mut needed: HashMap<Permutation, WorkspaceBytes> = HashMap::new();
    let mut bytes = 0;
    for finish in &placement.finishes {
        let Finish::Reorder(matrices, how) = finish else { continue };
        // what cannot be launched is said when it is
        let Ok(reorder) = Reorder::new(matrices, *how) else { continue };
        let wanted = match reorder.permutation() {
            None => reorder.workspace(None, device),
            Some(permutation) => *needed
                .entry(permutation)
                .or_insert_with(|| reorder.workspace(Some(&permutation.segments()), device)),
        };
        bytes = bytes.max(wanted.most.min(WORKSPACE_BYTES_MAX).max(wanted.least));
    }
    bytes
}

/// Runs the finishes of one rank on its device, one after the other.
#[derive(Debug)]
pub(crate) struct Finisher {
    rank: u32,
    stream: Stream,
    /// For what is looked at while finishes go on.
    looks: Stream,
    permutations: Permutations,
    workspace: DeviceMemory,
    /// A U32 for each finish, which becomes 1 where it refuses its values.
    refused: DeviceMemory,
}

impl Finisher {
    pub(crate) fn new(
        device: &Arc<Device>,
        rank: u32,
        placement: &Placement,
    ) -> Result<Self, RankError> {
        let workspace = workspace_bytes(placement, device.geometry());
        let flags = 4 * placement.finishes.len() as u64;
        let this = Self {
            rank,
            stream: device.stream()?,
            looks: device.stream()?,
            permutations: Permutations::new(device)?,
            workspace: device.allocate("workspace", workspace)?,
            refused: device.allocate("workspace", flags)?,
        };
        // SAFETY: the memory is as long and nobody else knows of it; `this` keeps it until the stream was waited for.
        unsafe { this.stream.fill(this.refused.address(), 0, flags) }?;
        this.stream.synchronize()?;
        Ok(this)
    }

    /// Waits for everything that was enqueued.
    pub(crate) fn synchronize(&self) -> Result<(), CudaError> {
        self.stream.synchronize()
    }

    /// Enqueues finish `number`; the event tells when it is done.
    ///
    /// # Safety
    /// As `post_process::run`, until the event; and the memory is kept until then.
    ///
    /// # Errors
    /// A scheme that this transform does not know, or what the device says.
    pub(crate) unsafe fn enqueue(
        &self,
        number: u32,
        memory: &ParamMemory,
    ) -> Result<Event, RankError> {
        let finish = &memory.placement().finishes[number as usize];
        // SAFETY: passed on from the caller; the workspace is this stream's alone.
        unsafe {
            match finish {
                Finish::MlaSplit(split) => self.mla_split(split, memory),
                Finish::KvScales(scales) => self.kv_scales(scales, number, memory),
                Finish::Reorder(matrices, how) => {
                    let address = memory.address(matrices.param);
                    let workspace = Workspace::from(&self.workspace);
                    Reorder::new(matrices, *how)
                        .and_then(|reorder| {
                            self.permutations.reorder(&self.stream, &reorder, address, workspace)
                        })
                        .map_err(RankError::from)
                }
                Finish::SwizzleInto(swizzle) => {
                    let source = memory.address(swizzle.source.param);
                    let target = memory.address(swizzle.target);
                    Ok(launch::swizzle_into(&self.stream, swizzle, source, target)?)
                }
                Finish::LinearScalars(scalars) => self.linear_scalars(scalars, memory),
                Finish::ExpertScalars(scalars) => self.expert_scalars(scalars, memory),
            }
        }?;
        let event = self.stream.device().event()?;
        self.stream.record(&event)?;
        Ok(event)
    }

    /// # Safety
    /// As [`Finisher::enqueue`].
    unsafe fn mla_split(&self, split: &MlaSplit, memory: &ParamMemory) -> Result<(), RankError> {
        let param = &memory.placement().params[split.weight as usize];
        let data = memory.address(split.weight);
        let weight = match (split.scheme, split.scale.map(|scale| memory.address(scale))) {
            (Scheme::Bf16, _) => MlaWeight::Plain { data, dtype: param.dtype },
            (Scheme::Fp8, Some(scale)) => MlaWeight::Fp8 { data, scale },
            (Scheme::Mxfp4, Some(scale)) => MlaWeight::Mxfp4 { data, scale },
            (scheme, _) => {
                let what = format!("no MLA split of {}", scheme.name());
                return Err(RankError::Transform { param: param.name.clone(), what });
            }
        };
        let dims = Dims {
            heads: split.heads as usize,
            dn: split.dn as usize,
            dv: split.dv as usize,
            kl: split.kl as usize,
        };
        let (w_kc, w_vc) = (memory.address(split.w_kc), memory.address(split.w_vc));
        // SAFETY: passed on from the caller; the parameters have the shapes that the split says.
        Ok(unsafe { launch::mla_split(&self.stream, weight, dims, w_kc, w_vc) }?)
    }

    /// # Safety
    /// As [`Finisher::enqueue`].
    unsafe fn linear_scalars(
        &self,
        s: &LinearScalars,
        memory: &ParamMemory,
    ) -> Result<(), RankError> {
        let kernel = Linear {
            scale_2: memory.address(s.scale_2),
            scale_2_count: floats(memory, s.scale_2),
            input_scale: memory.address(s.input_scale),
            input_count: floats(memory, s.input_scale),
            alpha: memory.address(s.alpha),
            inverse_input: memory.address(s.inverse),
        };
        // SAFETY: passed on from the caller; counts are those of the parameters.
        Ok(unsafe { launch::linear_scalars(&self.stream, &kernel) }?)
    }

    /// # Safety
    /// As [`Finisher::enqueue`].
    unsafe fn expert_scalars(
        &self,
        s: &ExpertScalars,
        memory: &ParamMemory,
    ) -> Result<(), RankError> {
        let group = u64::from(memory.placement().parallel.expert_group(self.rank));
        let kernel = Experts {
            w13_scale_2: memory.address(s.w13_scale_2),
            w2_scale_2: memory.address(s.w2_scale_2),
            w13_input: memory.address(s.w13_input),
            w2_input: memory.address(s.w2_input),
            g1_alphas: memory.address(s.g1_alphas),
            g2_alphas: memory.address(s.g2_alphas),
            w13_quant: memory.address(s.w13_quant),
            w2_quant: memory.address(s.w2_quant),
            g1_scale_c: s.g1_scale_c.map_or(0, |param| memory.address(param)),
            slots: floats(memory, s.w2_scale_2),
            experts: floats(memory, s.w2_input),
            first_expert: (group * s.per_group) as u32,
            per_group: s.per_group as u32,
            routed: s.routed as u32,
            per_expert: s.per_expert.into(),
            quants: floats(memory, s.w13_quant),
        };
        // SAFETY: passed on from the caller; counts are those of the parameters.
        Ok(unsafe { launch::expert_scalars(&self.stream, &kernel) }?)
    }

    /// # Safety
    /// As [`Finisher::enqueue`].
    unsafe fn kv_scales(
        &self,
        scales: &KvScales,
        number: u32,
        memory: &ParamMemory,
    ) -> Result<(), RankError> {
        let kernel = KvKernel {
            k: memory.address(scales.k),
            v: memory.address(scales.v),
            v_given: scales.v_given.into(),
            refused: self.flag(number),
        };
        // SAFETY: passed on from the caller; the flag was zeroed and is this finish's alone.
        Ok(unsafe { launch::kv_scales(&self.stream, &kernel) }?)
    }

    fn flag(&self, number: u32) -> u64 {
        self.refused.address() + 4 * u64::from(number)
    }

    /// Whether finish `number`, which is done, has taken its values.
    ///
    /// # Errors
    /// It refused them, or the device fails.
    pub(crate) fn check(&self, number: u32, memory: &ParamMemory) -> Result<(), RankError> {
        let Finish::KvScales(scales) = &memory.placement().finishes[number as usize] else {
            return Ok(());
        };
        match self.word(self.flag(number))? {
            0 => Ok(()),
            _ => {
                // the kernel leaves a pair that it refuses as it was
                let value = |param| self.word(memory.address(param)).map(f32::from_bits);
                let v = if scales.v_given { value(scales.v)? } else { f32::NAN };
                Err(contradiction(memory, scales, value(scales.k)?, v))
            }
        }
    }

    /// Four bytes of the device's memory that nothing writes any more.
    fn word(&self, address: u64) -> Result<u32, CudaError> {
        let mut word = [0; 4];
        // SAFETY: `word` is ours and stays until the stream was waited for, also where that fails: a device that fails
        // copies nothing more; the address is that of a flag or a parameter, says the caller.
        unsafe { self.looks.copy_to_host(word.as_mut_ptr(), address, 4) }?;
        self.looks.synchronize()?;
        Ok(u32::from_le_bytes(word))
    }
}

/// The F32 elements of a parameter: how many.
fn floats(memory: &ParamMemory, param: ParamId) -> u32 {
    // scalars of experts: a few hundred
    (memory.placement().params[param as usize].bytes / 4) as u32
}
