/**
 * `npm run fuzz -- --minutes N`, `--help` for the rest: searches for inputs that a target does not survive, guided by what it
 * does. One that is found is printed in one line that repeats it, and in one that makes a regression test as a file of
 * test/fuzz/corpus.
 */
import { createHash } from "node:crypto";
import { mkdirSync, readdirSync, readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { Command, InvalidArgumentError, Option } from "commander";
import { Random } from "./bytes.ts";
import { search } from "./engine.ts";
import { targets } from "./targets.ts";

const SLICE_MS = 10_000;

const positive = (text: string): number => {
  const value = Number(text);
  if (!(value > 0)) throw new InvalidArgumentError("It must be a number above 0.");
  return value;
};
const values = new Command("npm run fuzz --")
  .description("searches for inputs that the ring core or the protocol's state machine does not survive")
  .option("--minutes <n>", "how long", positive, 1)
  .option("--seed <n>", "where the random numbers begin", Number, Date.now() % 1_000_000)
  .addOption(new Option("--target <name>", "what to search").choices(["all", ...Object.keys(targets)]).default("all"))
  .option("--corpus <directory>", "inputs to begin with; those that do something new are added")
  .option("--input <base64>", "just this one")
  .parse()
  .opts<{ minutes: number; seed: number; target: string; corpus?: string; input?: string }>();
const chosen = Object.entries(targets).filter(([name]) => values.target === "all" || values.target === name);
const { minutes, seed } = values;

if (values.input === undefined) {
  for (const [name, target] of chosen) await fuzz(name, target, (minutes * 60_000) / chosen.length);
} else {
  const input = Buffer.from(values.input, "base64");
  for (const [, target] of chosen) await target.run(input);
  console.log("this input does no harm");
}

async function fuzz(name: string, target: (typeof targets)[string], ms: number): Promise<void> {
  const random = new Random(seed);
  const directory = values.corpus && join(values.corpus, name);
  const from = performance.now();
  let shown = from;
  const report = await search(
    target.run,
    [...target.seeds(), ...(directory ? readCorpus(directory) : [])],
    random,
    (runs) => {
      const now = performance.now();
      if (now - shown > SLICE_MS) {
        shown = now;
        console.log(`${name}: ${runs} runs in ${Math.round((now - from) / 1000)} s`);
      }
      return now - from > ms;
    },
  );
  if (directory) for (const input of report.corpus) keep(directory, input);
  console.log(
    `${name}: seed ${seed}, ${report.runs} runs, ${report.corpus.length} inputs that did something new, ${report.covered} features`,
  );
  if (!report.finding) return;
  const { input, message } = report.finding;
  console.log(`${name}: ${message}`);
  console.log(`npm run fuzz -- --target ${name} --input ${Buffer.from(input).toString("base64")}`);
  console.log(JSON.stringify({ target: name, about: message.split("\n")[0], ...(target.keep(input) as object) }));
  process.exitCode = 1;
}

function readCorpus(directory: string): Uint8Array[] {
  mkdirSync(directory, { recursive: true });
  return readdirSync(directory).map((name) => readFileSync(join(directory, name)));
}

function keep(directory: string, input: Uint8Array): void {
  writeFileSync(join(directory, createHash("sha256").update(input).digest("hex").slice(0, 16)), input);
}
