//! Random operands, biased to where mistakes are.

/// The generator: SplitMix64. Its results are part of what a seed means, so it is written out here.
#[derive(Debug, Clone)]
pub struct Random(u64);

impl Random {
    /// Starts from a seed; different `stream`s of it are unrelated.
    pub fn new(seed: u64, stream: u64) -> Self {
        let mut random = Self(seed ^ stream.wrapping_mul(0xd134_2543_de82_ef95));
        random.next();
        random
    }

    /// 64 random bits.
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ self.0 >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ z >> 31
    }

    /// A number below `bound`.
    pub fn below(&mut self, bound: u64) -> u64 {
        ((u128::from(self.next()) * u128::from(bound)) >> 64) as u64
    }

    /// True in `percent` of the cases.
    pub fn percent(&mut self, percent: u64) -> bool {
        self.below(100) < percent
    }

    /// One of `choices`.
    pub fn pick<T: Copy>(&mut self, choices: &[T]) -> T {
        choices[self.below(choices.len() as u64) as usize]
    }
}

const INTEGERS: [u64; 24] = [
    0,
    1,
    2,
    3,
    7,
    8,
    0x7f,
    0x80,
    0xff,
    0x7fff,
    0x8000,
    0xffff,
    0x7fff_ffff,
    0x8000_0000,
    0xffff_ffff,
    0x1_0000_0000,
    0x7fff_ffff_ffff_ffff,
    0x8000_0000_0000_0000,
    0x8000_0000_0000_0001,
    0xffff_ffff_ffff_fffe,
    u64::MAX,
    0xffff_ffff_8000_0000,
    0x5555_5555_5555_5555,
    0x0f0f_0f0f_f0f0_f0f0,
];

const SINGLES: [u32; 30] = [
    0,
    0x8000_0000,
    0x3f80_0000, // 1
    0xbf80_0000, // -1
    0x4000_0000, // 2
    0x3f00_0000, // 0.5
    0x3f7f_ffff, // just below 1
    0x3f80_0001, // just above 1
    0x0000_0001, // smallest denormal
    0x8000_0001,
    0x007f_ffff, // largest denormal
    0x0080_0000, // smallest normal
    0x8080_0000,
    0x0080_0001,
    0x7f7f_ffff, // largest
    0xff7f_ffff,
    0x7f80_0000, // infinities
    0xff80_0000,
    0x7fc0_0000, // quiet NaNs
    0xffc0_0000,
    0x7fd2_3456,
    0x7f80_0001, // signalling NaNs
    0xffa5_5555,
    0x4f00_0000, // 2^31
    0xcf00_0000,
    0x4eff_ffff,
    0x5f00_0000, // 2^63
    0xdf00_0000,
    0x4b00_0001, // where integers begin
    0x3fc0_0000, // 1.5
];

const DOUBLES: [u64; 32] = [
    0,
    0x8000_0000_0000_0000,
    0x3ff0_0000_0000_0000, // 1
    0xbff0_0000_0000_0000, // -1
    0x4000_0000_0000_0000, // 2
    0x3fe0_0000_0000_0000, // 0.5
    0x3fef_ffff_ffff_ffff,
    0x3ff0_0000_0000_0001,
    0x0000_0000_0000_0001, // smallest denormal
    0x8000_0000_0000_0001,
    0x000f_ffff_ffff_ffff, // largest denormal
    0x0010_0000_0000_0000, // smallest normal
    0x8010_0000_0000_0000,
    0x0010_0000_0000_0001,
    0x7fef_ffff_ffff_ffff, // largest
    0xffef_ffff_ffff_ffff,
    0x7ff0_0000_0000_0000, // infinities
    0xfff0_0000_0000_0000,
    0x7ff8_0000_0000_0000, // quiet NaNs
    0xfff8_0000_0000_0000,
    0x7ffa_1234_5678_9abc,
    0x7ff0_0000_0000_0001, // signalling NaNs
    0xfff5_5555_5555_5555,
    0x41df_ffff_ffc0_0000, // 2^31 - 1
    0x41e0_0000_0000_0000, // 2^31
    0xc1e0_0000_0000_0000,
    0x41df_ffff_ffff_ffff,
    0x43e0_0000_0000_0000, // 2^63
    0xc3e0_0000_0000_0000,
    0x36a0_0000_0000_0000, // smallest denormal of single precision
    0x47ef_ffff_e000_0000, // largest of single precision
    0x4330_0000_0000_0001, // where integers begin
];

/// Exponent with sign, and significand.
const EXTENDED: [(u16, u64); 40] = [
    (0, 0),
    (0x8000, 0),
    (0x3fff, 1 << 63), // 1
    (0xbfff, 1 << 63),
    (0x4000, 1 << 63), // 2
    (0x3ffe, 1 << 63), // 0.5
    (0x3ffe, u64::MAX),
    (0x3fff, 1 << 63 | 1),
    (0, 1), // smallest denormal
    (0x8000, 1),
    (0, u64::MAX >> 1), // largest denormal
    (0, 1 << 63),       // pseudo-denormal
    (1, 1 << 63),       // smallest normal
    (0x8001, 1 << 63),
    (0x7ffe, u64::MAX), // largest
    (0xfffe, u64::MAX),
    (0x7fff, 1 << 63), // infinities
    (0xffff, 1 << 63),
    (0x7fff, 3 << 62), // quiet NaNs
    (0xffff, 3 << 62),
    (0x7fff, 0xd234_5678_9abc_def0),
    (0x7fff, 1 << 63 | 1), // signalling NaNs
    (0xffff, 0xa555_5555_5555_5555),
    (0x7fff, 0),                     // pseudo-infinity
    (0x7fff, 1),                     // pseudo-NaN
    (0x4000, 1 << 62),               // unnormal
    (0x3c01, 1 << 63),               // smallest normal of double precision
    (0x3bcd, 1 << 63),               // its smallest denormal
    (0x43fe, 0xffff_ffff_ffff_f800), // its largest
    (0x3f81, 1 << 63),               // smallest normal of single precision
    (0x3f6a, 1 << 63),
    (0x407e, 0xffff_ff00_0000_0000), // its largest
    (0x400d, 0xfffe_0000_0000_0000), // 2^15 - 0.5
    (0x400e, 1 << 63),               // 2^15
    (0x401d, 0xffff_ffff_0000_0000), // 2^31 - 0.5
    (0xc01e, 1 << 63),               // -2^31
    (0x403e, 1 << 63),               // 2^63
    (0xc03e, 1 << 63),
    (0x403d, u64::MAX),
    (0x3fff, 3 << 62), // 1.5
];

impl Random {
    /// A general register's contents.
    pub fn integer(&mut self) -> u64 {
        match self.below(8) {
            0..3 => self.pick(&INTEGERS),
            3 => self.below(256),
            4 => self.pick(&INTEGERS).wrapping_add(self.below(5)).wrapping_sub(2),
            5 => 1 << self.below(64),
            6 => self.next() as u32 as u64,
            _ => self.next(),
        }
    }

    fn single(&mut self) -> u32 {
        match self.below(4) {
            0 | 1 => self.pick(&SINGLES),
            // Near one another, so that sums cancel and products stay in range.
            2 => {
                (self.next() as u32 & 0x807f_ffff) | (0x3d80_0000 + ((self.below(8) as u32) << 23))
            }
            _ => self.next() as u32,
        }
    }

    fn double(&mut self) -> u64 {
        match self.below(4) {
            0 | 1 => self.pick(&DOUBLES),
            2 => {
                self.next() & 0x800f_ffff_ffff_ffff
                    | (0x3ff0_0000_0000_0000 + (self.below(80) << 52) - (40 << 52))
            }
            _ => self.next(),
        }
    }

    /// Contents of an x87 register, ten bytes.
    pub fn extended(&mut self) -> u128 {
        let (sign_exponent, significand) = match self.below(8) {
            0..3 => self.pick(&EXTENDED),
            3..6 => {
                let sign = (self.next() as u16) & 0x8000;
                let exponent = 0x3fff + self.below(140) as u16 - 70;
                (sign | exponent, self.next() | 1 << 63)
            }
            6 => {
                // An integer, perhaps with a half.
                let value = self.integer() | 1;
                let shift = value.leading_zeros();
                let exponent = 0x403e - shift as u16 - self.below(2) as u16;
                (exponent | (self.next() as u16) & 0x8000, value << shift)
            }
            _ => (self.next() as u16, self.next() | 1 << 63),
        };
        u128::from(significand) | u128::from(sign_exponent) << 64
    }

    /// Sixteen bytes of a vector register or of memory.
    pub fn vector(&mut self) -> u128 {
        match self.below(8) {
            0 | 1 => (0..4).fold(0, |v, n| v | u128::from(self.single()) << (32 * n)),
            2 | 3 => u128::from(self.double()) | u128::from(self.double()) << 64,
            4 => self.extended(),
            5 => u128::from(self.integer()) | u128::from(self.integer()) << 64,
            6 => {
                // Bytes and words around the limits of saturation, some of them equal, some zero.
                let bytes: [u8; 16] =
                    std::array::from_fn(|_| self.pick(&[0, 1, 0x7f, 0x80, 0x81, 0xff, 0x41, 0x42]));
                u128::from_le_bytes(bytes)
            }
            _ => u128::from(self.next()) | u128::from(self.next()) << 64,
        }
    }

    /// MXCSR: usually everything masked.
    pub fn mxcsr(&mut self) -> u32 {
        let masks = match self.below(8) {
            0 => self.next() as u32 & 0x1f80,
            _ => 0x1f80,
        };
        let rounding = if self.percent(50) { self.next() as u32 & 0x6000 } else { 0 };
        let flushing = if self.percent(25) { self.next() as u32 & 0x8040 } else { 0 };
        let flags = if self.percent(25) { self.next() as u32 & 0x3f } else { 0 };
        masks | rounding | flushing | flags
    }

    /// The x87 control word: usually everything masked and full precision.
    pub fn x87_control(&mut self) -> u16 {
        let masks = if self.percent(12) { self.next() as u16 & 0x3f } else { 0x3f };
        let rounding = if self.percent(50) { self.next() as u16 & 0xc00 } else { 0 };
        let precision = if self.percent(25) { self.pick(&[0, 0x200]) } else { 0x300 };
        0x40 | masks | rounding | precision
    }

    /// The FXSAVE image of everything that is not a general register.
    pub fn fx_image(&mut self) -> [u8; 512] {
        let mut image = [0u8; 512];
        let control = self.x87_control();
        let mut status = self.next() as u16 & 0x4700;
        status |= (self.below(8) as u16) << 11;
        if self.percent(25) {
            status |= self.next() as u16 & 0x7f;
        }
        if !self.percent(6) {
            // Without an exception that waits.
            status &= !(!control & 0x3f);
        }
        if status & !control & 0x3f != 0 {
            status |= 0x8080;
        }
        let valid = match self.below(4) {
            0 => self.next() as u8,
            1 => 0x7f_u8.rotate_right(8 - u32::from(status >> 11 & 7)),
            // ST(0) to ST(3), whatever TOP is.
            _ => 0x0f_u8.rotate_left(u32::from(status >> 11 & 7)),
        };
        image[0..2].copy_from_slice(&control.to_le_bytes());
        image[2..4].copy_from_slice(&status.to_le_bytes());
        image[4] = valid;
        image[24..28].copy_from_slice(&self.mxcsr().to_le_bytes());
        image[28..32].copy_from_slice(&0xffffu32.to_le_bytes());
        for register in image[32..160].chunks_exact_mut(16) {
            register[..10].copy_from_slice(&self.extended().to_le_bytes()[..10]);
        }
        for register in image[160..416].chunks_exact_mut(16) {
            register.copy_from_slice(&self.vector().to_le_bytes());
        }
        image
    }
}
