/**
 * Coverage-guided search: inputs that made the target do something new are kept, and changed to make others.
 *
 * What a target did is a set of numbers, its features; how often each came about is known to the power of two.
 */
import { mutate, Random } from "./bytes.ts";

/** Counts of what happened, by feature. */
export type Features = Map<number, number>;

/** Does what the input says. @throws whatever it finds wrong */
export type Target = (input: Uint8Array) => Features | Promise<Features>;

/** An input that the target does not survive. */
export interface Finding {
  input: Uint8Array;
  message: string;
}

export interface Report {
  runs: number;
  corpus: readonly Uint8Array[];
  /** Features seen, each with each power of two of its counts. */
  covered: number;
  finding?: Finding;
}

const FIRST_LENGTH = 120;
const FRESH_ONE_IN = 20;

/**
 * Searches until something is found or the time is over.
 * @param isOver asked after each run
 */
export async function search(
  target: Target,
  seeds: readonly Uint8Array[],
  random: Random,
  isOver: (runs: number) => boolean,
): Promise<Report> {
  const corpus: Uint8Array[] = [];
  const covered = new Set<number>();
  let runs = 0;
  const isNew = (features: Features): boolean => {
    const before = covered.size;
    for (const [feature, count] of features) covered.add(feature * 32 + Math.floor(Math.log2(count)));
    return covered.size > before;
  };
  const next = (): Uint8Array => {
    const seed = seeds[runs];
    if (seed) return seed;
    if (corpus.length === 0 || random.below(FRESH_ONE_IN) === 0) return random.bytes(random.below(FIRST_LENGTH));
    return mutate(corpus[random.below(corpus.length)]!, corpus[random.below(corpus.length)]!, random);
  };
  for (; !isOver(runs); runs++) {
    const input = next();
    try {
      if (isNew(await target(input))) corpus.push(input);
    } catch (error) {
      return { runs: runs + 1, corpus, covered: covered.size, finding: await shorten(target, input, messageOf(error)) };
    }
  }
  return { runs, corpus, covered: covered.size };
}

/** Leaves out of an input what its failure does not need. */
async function shorten(target: Target, input: Uint8Array, message: string): Promise<Finding> {
  let best = { input, message };
  for (let length = input.length >> 1; length > 0; length >>= 1) {
    for (let at = 0; at < best.input.length;) {
      const shorter = Uint8Array.from([...best.input.slice(0, at), ...best.input.slice(at + length)]);
      const failure = await failureOf(target, shorter);
      if (failure !== undefined && kindOf(failure) === kindOf(message)) best = { input: shorter, message: failure };
      else at += length;
    }
  }
  return best;
}

async function failureOf(target: Target, input: Uint8Array): Promise<string | undefined> {
  try {
    await target(input);
    return undefined;
  } catch (error) {
    return messageOf(error);
  }
}

/** Failures that differ in numbers only are the same. */
function kindOf(message: string): string {
  return message
    .split("\n")[0]!
    .replaceAll(/0x[0-9a-f]+|\d+/g, "N")
    .slice(0, 40);
}

function messageOf(error: unknown): string {
  return error instanceof Error ? `${error.name}: ${error.message}` : String(error);
}
