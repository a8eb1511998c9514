//! KV-cache scales, which checkpoints may or may not have. Source: reference §2.5; contract §2 and §4, "KV scales".

use crate::{
    declare::Declare,
    dtype::Dtype,
    error::PlanError,
    transform::{Finish, KvScales},
};

/// Declares the scales of one attention layer, if the checkpoint has them: `{from}k_proj.k_scale` becomes
/// `{to}{attention}.k_scale`, F32 `[]`.
pub(crate) fn kv_scales(
    d: &mut Declare<'_>,
    [to, from]: [&str; 2],
    attention: &str,
) -> Result<(), PlanError> {
    let [k, v] = ["k", "v"].map(|x| format!("{from}{x}_proj.{x}_scale"));
    let [k_name, v_name] = ["k", "v"].map(|x| format!("{to}{attention}.{x}_scale"));
    match (d.has(&k), d.has(&v)) {
        (false, false) => Ok(()),
        (false, true) if d.layout.derive => {
            Err(PlanError::unsupported(v, format!("{k} is missing"), "a v_scale needs a k_scale"))
        }
        (has_k, has_v) => {
            for (name, source, has) in [(&k_name, &k, has_k), (&v_name, &v, has_v)] {
                if has {
                    d.replicated_as(name, source, &[], Dtype::F32, Dtype::F32);
                }
            }
            if d.layout.derive {
                let last = d.last_param();
                let (k, v) = match has_v {
                    true => (last - 1, last),
                    false => (last, d.derived(v_name, Dtype::F32, Vec::new())),
                };
                d.after(Finish::KvScales(KvScales { k, v, v_given: has_v }));
            }
            Ok(())
        }
    }
}
