// A picture from a prompt, with an export of minidiff (`minidiff export MODEL DIR --to onnx`) and ONNX Runtime: the
// tokenizer, torch's noise, the plan's weighted sums, guidance and the decoder. For models with one text encoder.

const json = async (url) => (await fetch(url)).json();
const text = async (url) => (await fetch(url)).text();

export class Model {
  static async open(ort, folder, plan) {
    const model = new Model();
    model.ort = ort;
    model.manifest = await json(`${folder}/manifest.json`);
    if (model.manifest.to !== "onnx") throw new Error(`${folder}: export the model with --to onnx`);
    model.plan = await json(`${folder}/${plan ?? model.manifest.plans[0]}`);
    const merges = (await text(`${folder}/tokenizer/merges.txt`)).split("\n").slice(1).filter(Boolean);
    model.tokenizer = new Tokenizer(await json(`${folder}/tokenizer/vocab.json`), merges,
      model.manifest.config.tokenizer);
    for (const name of ["text_encoder", "unet", "vae_decoder"]) {
      const { file } = model.manifest.programs[name];
      const externalData = [{ path: `${file}.data`, data: `${folder}/${file}.data` }];
      model[name] = await ort.InferenceSession.create(`${folder}/${file}`, { externalData, executionProviders: ["wasm"] });
    }
    return model;
  }

  async run(program, inputs) {
    const outputs = await this[program].run(inputs);
    return outputs[this.manifest.programs[program].outputs[0]];
  }

  // Returns { latents, pixels }: Float32Arrays, pixels of shape (3, height, width) in about -1..1.
  async draw(prompt, { seed = 0, guidance = 7.5, width, height, negative = "", told = () => {} } = {}) {
    const { Tensor } = this.ort, rows = this.plan.rows;
    const ids = [negative, prompt].flatMap((one) => this.tokenizer.encode(one));
    const idTensor = new Tensor("int64", BigInt64Array.from(ids, BigInt), [2, ids.length / 2]);
    const context = await this.run("text_encoder", { ids: idTensor });
    const channels = this.manifest.programs.vae_decoder.inputs.latents.axes[1];
    const shape = [1, channels, height / this.manifest.factor, width / this.manifest.factor];
    const size = channels * shape[2] * shape[3], random = new Random(seed);

    let values = { x: random.normal(size).map((z) => z * this.plan.first) };
    for (const [i, row] of rows.entries()) {
      const both = new Float32Array(2 * size);
      values.x.forEach((x, k) => { both[k] = both[k + size] = row.scale * x; });
      const x = new Tensor("float32", both, [2, ...shape.slice(1)]);
      const t = new Tensor("float32", Float32Array.of(row.timestep, row.timestep), [2]);
      const out = (await this.run("unet", { x, t, context })).data;
      values.out = Float64Array.from({ length: size }, (_, k) => out[k] + guidance * (out[k + size] - out[k]));
      values.noise = row.draws ? random.normal(size) : new Float64Array(size);
      const after = { x: total(row.x, values, size) };
      for (const [name, weights] of Object.entries(row.remember)) after[name] = total(weights, values, size);
      values = after;
      told(i + 1, rows.length);
    }
    const latents = Float32Array.from(values.x);
    const scaled = new Tensor("float32", latents.map((z) => z / this.manifest.scaling_factor), shape);
    return { latents, pixels: (await this.run("vae_decoder", { latents: scaled })).data };
  }
}

// The weighted sum of a row of the plan.
function total(weights, values, size) {
  const sum = new Float64Array(size);
  for (const [name, weight] of Object.entries(weights)) values[name].forEach((v, k) => { sum[k] += weight * v; });
  return sum;
}

// CLIP's byte-pair encoding, for texts of common characters (Python's tables of letters are finer).
export class Tokenizer {
  constructor(vocab, merges, { length, pad }) {
    Object.assign(this, { vocab, length, pad });
    this.ranks = new Map(merges.map((pair, rank) => [pair, rank]));
    const printable = [...Array(256).keys()].filter((b) => (b > 32 && b < 127) || (b > 160 && b !== 173));
    let next = 256;
    this.letters = [...Array(256).keys()].map((b) => String.fromCharCode(printable.includes(b) ? b : next++));
  }

  encode(prompt) {
    const words = prompt.toLowerCase().match(/'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+/gu) ?? [];
    const ids = words.flatMap((word) => this.merged(word).map((token) => this.vocab[token]));
    const start = this.vocab["<|startoftext|>"], end = this.vocab["<|endoftext|>"];
    const row = [start, ...ids.slice(0, this.length - 2), end];
    return [...row, ...Array(this.length - row.length).fill(this.pad)];
  }

  merged(word) {
    const tokens = [...new TextEncoder().encode(word)].map((byte) => this.letters[byte]);
    tokens[tokens.length - 1] += "</w>";
    for (;;) {
      const ranks = tokens.slice(1).map((token, k) => this.ranks.get(`${tokens[k]} ${token}`) ?? Infinity);
      const best = Math.min(...ranks);
      if (best === Infinity || !ranks.length) return tokens;
      const k = ranks.indexOf(best);
      tokens.splice(k, 2, tokens[k] + tokens[k + 1]);
    }
  }
}

// torch.Generator().manual_seed(seed) and torch.randn of a multiple of 16 numbers: a Mersenne twister's 24 bits as
// uniform numbers, and Box and Muller's transformation of eight pairs at a time.
export class Random {
  constructor(seed) {
    this.state = new Uint32Array(624);
    this.state[0] = seed;
    for (let i = 1; i < 624; i++) {
      const before = this.state[i - 1] ^ (this.state[i - 1] >>> 30);
      this.state[i] = Math.imul(1812433253, before) + i;
    }
    this.at = 624;
  }

  next() {
    const s = this.state;
    if (this.at === 624) {
      for (let k = 0; k < 624; k++) {
        const y = (s[k] & 0x80000000) | (s[(k + 1) % 624] & 0x7fffffff);
        s[k] = s[(k + 397) % 624] ^ (y >>> 1) ^ (y & 1 ? 0x9908b0df : 0);
      }
      this.at = 0;
    }
    let y = s[this.at++];
    y ^= y >>> 11;
    y ^= (y << 7) & 0x9d2c5680;
    y ^= (y << 15) & 0xefc60000;
    return (y ^ (y >>> 18)) >>> 0;
  }

  normal(size) {
    if (size % 16) throw new Error(`${size} numbers: the noise is made 16 at a time`);
    const found = Float64Array.from({ length: size }, () => (this.next() & 0xffffff) / 2 ** 24);
    for (let i = 0; i < size; i += 16) {
      for (let k = i; k < i + 8; k++) {
        const radius = Math.sqrt(-2 * Math.log(1 - found[k])), angle = 2 * Math.PI * found[k + 8];
        [found[k], found[k + 8]] = [radius * Math.cos(angle), radius * Math.sin(angle)];
      }
    }
    return found.map(Math.fround);
  }
}
