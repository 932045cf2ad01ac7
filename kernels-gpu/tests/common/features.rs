//! What a test problem has beyond plain attention.

use kernels_gpu::{args::Keys, constants::Constants};
use simt::scalar::Scalar;

use super::{Case, values};

/// Features of models: windows, groups of heads, what shapes scores.
#[derive(Clone, Copy, Debug)]
pub struct Features {
    /// Heads of Q for each of K and V.
    pub group: u32,
    /// Keys before and after its own position that a row sees.
    pub left: Option<u32>,
    pub right: Option<u32>,
    /// 0: none.
    pub softcap: f32,
    pub alibi: bool,
    pub bias: bool,
    pub sinks: bool,
}

impl Features {
    pub const NONE: Self = Self {
        group: 1,
        left: None,
        right: None,
        softcap: 0.0,
        alibi: false,
        bias: false,
        sinks: false,
    };

    pub fn constants(&self) -> Constants {
        Constants {
            causal: if self.right.is_some() { 2 } else { 0 },
            left: self.left.is_some().into(),
            group: if self.group > 1 { self.group } else { 0 },
            softcap: u32::from(self.softcap > 0.0),
            alibi: self.alibi.into(),
            bias: self.bias.into(),
            sinks: self.sinks.into(),
            ..Constants::NONE
        }
    }

    pub fn keys(&self) -> Keys {
        let (left, right) = (self.left.unwrap_or(0), self.right.unwrap_or(0));
        Keys { left, right, ..Keys::default() }
    }

    /// Whether the window of a row at `row` has the key at `key`.
    pub fn window_sees(&self, row: u32, key: u32) -> bool {
        let (row, key) = (u64::from(row), u64::from(key));
        self.left.is_none_or(|left| row <= key + u64::from(left))
            && self.right.is_none_or(|right| key <= row + u64::from(right))
    }

    pub fn capped(&self, s: f64) -> f64 {
        let cap = f64::from(self.softcap);
        if cap > 0.0 { cap * (s / cap).tanh() } else { s }
    }

    pub fn slopes(&self, heads: u32) -> Vec<f32> {
        let of_head = |h| 0.5 / (1 + h) as f32;
        if self.alibi { (0..heads).map(of_head).collect() } else { Vec::new() }
    }

    pub fn sinks(&self, heads: u32) -> Vec<f32> {
        let of_head = |h| 0.7 * h as f32 - 0.4;
        if self.sinks { (0..heads).map(of_head).collect() } else { Vec::new() }
    }

    pub fn bias<T: Scalar>(&self, count: u32) -> Vec<T> {
        if self.bias { values(count, 9) } else { Vec::new() }
    }
}

/// Each feature by itself, and all of them, around tiles of `br` rows and `bc` keys.
pub fn feature_cases(d: u32, br: u32, bc: u32) -> Vec<Case> {
    let none = Features::NONE;
    let all = Features {
        group: 2,
        left: Some(bc / 2 + 3),
        right: Some(2),
        softcap: 3.0,
        alibi: true,
        bias: true,
        sinks: true,
    };
    let case = |seq_q, seq_k, features: Features| {
        let heads = if features.group > 1 { 2 * features.group } else { 2 };
        Case { heads, features, ..Case::new(seq_q, seq_k, d) }
    };
    vec![
        case(5, bc + 3, Features { group: 2, ..none }),
        case(br + 3, 3 * bc + 5, Features { left: Some(bc + 2), right: Some(0), ..none }),
        Case { causal: true, ..case(br + 3, br + 3, Features { left: Some(0), ..none }) },
        case(9, 2 * bc + 1, Features { left: Some(7), ..none }),
        case(9, bc + 1, Features { right: Some(3), ..none }),
        // More rows than keys: rows before the first key, whose windows are empty.
        case(bc + br + 9, bc + 1, Features { left: Some(4), right: Some(3), ..none }),
        // Bounds beyond every length.
        case(7, bc + 1, Features { left: Some(u32::MAX), right: Some(u32::MAX), ..none }),
        case(11, 5, Features { left: Some(u32::MAX - 1), right: Some(u32::MAX), ..none }),
        Case { size: 6.0, ..case(7, bc + 5, Features { softcap: 5.0, ..none }) },
        case(7, bc + 5, Features { alibi: true, ..none }),
        case(7, bc + 5, Features { bias: true, ..none }),
        case(7, bc + 5, Features { sinks: true, ..none }),
        // Rows without a key have their sink.
        Case { causal: true, ..case(bc + 5, 9, Features { sinks: true, ..none }) },
        case(19, 2 * bc + 7, all),
        Case { packed: true, ..case(br + 3, 2 * bc + 5, none) },
        Case { packed: true, interleaved: true, causal: true, ..case(br + 9, bc + 1, none) },
        Case {
            packed: true,
            interleaved: true,
            dropout: 0.2,
            ..case(2 * br + 1, bc + 3, Features { bias: false, ..all })
        },
        Case { padding: true, dropout: 0.2, interleaved: true, ..case(9, 2 * bc + 3, all) },
        Case { causal: true, padding: true, ..case(bc + 11, bc - 3, all) },
    ]
}
