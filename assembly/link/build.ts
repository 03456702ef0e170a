/**
 * Builds the core: compiles assembly/, links it with the guest accessors, optimises the whole.
 *
 *   build/core/core-<n>.wasm    n segments an end: guests of up to n * 16 GiB
 *   build/core/core-hooked.wasm accessors left as imports: tests see every guest access
 *
 * Run by `npm run core`; does nothing if its output is newer than all it is made from. asc cannot express more than one
 * memory, hence the step through text.
 */
import { globSync, mkdirSync, renameSync, statSync, writeFileSync } from "node:fs";
import { VARIANTS } from "../../src/datapath/variants.ts";
import { accessorFunctions, memoryImports } from "./accessors.ts";

const directory = "build/core";
const SOURCES = [
  "assembly/**/*.ts",
  "src/layout/*.ts",
  "src/datapath/variants.ts",
  "asconfig.json",
  "package-lock.json",
];

if (!isFresh()) await build();

async function build(): Promise<void> {
  // Only now: loading the compilers takes longer than finding out that there is nothing to do.
  const { default: asc } = await import("assemblyscript/asc");
  const { default: binaryen } = await import("binaryen");
  let compiled = new Uint8Array();
  const { error, stderr } = await asc.main(["--config", "asconfig.json", "--target", "release"], {
    writeFile: (_name, contents) => {
      compiled = Buffer.from(contents);
    },
  });
  if (error) throw new Error(`asc: ${error.message}\n${stderr.toString()}`);
  const unlinked = binaryen.readBinaryWithFeatures(compiled, featuresOf(binaryen));
  const text = unlinked.emitText();
  unlinked.dispose();
  for (const segments of VARIANTS) write(`core-${segments}`, link(binaryen, text, segments));
  write("core-hooked", compiled);
}

/** Output by output, the last one last: it stands for all of them. */
function isFresh(): boolean {
  const built = statSync(`${directory}/core-hooked.wasm`, { throwIfNoEntry: false });
  return built !== undefined && globSync(SOURCES).every((file) => statSync(file).mtimeMs < built.mtimeMs);
}

/** In one step: whoever loads the file at the same time gets the old or the new one. */
function write(name: string, bytes: Uint8Array): void {
  mkdirSync(directory, { recursive: true });
  const temporary = `${directory}/.${name}.${process.pid}`;
  writeFileSync(temporary, bytes);
  renameSync(temporary, `${directory}/${name}.wasm`);
}

type Binaryen = typeof import("binaryen").default;

function featuresOf({ Features }: Binaryen): number {
  return (
    Features.Atomics |
    Features.BulkMemory |
    Features.BulkMemoryOpt |
    Features.MultiMemory |
    Features.Memory64 |
    Features.MutableGlobals |
    Features.SIMD128 |
    Features.SignExt |
    Features.NontrappingFPToInt
  );
}

/** Replaces the accessor imports by code over `segments` memories an end. */
function link(binaryen: Binaryen, text: string, segments: number): Uint8Array {
  const importLine = /^\s*\(import "guest" "(\w+)" \(func \$(\S+).*\)\)$/gm;
  const names = new Map([...text.matchAll(importLine)].map(([, accessor, name]) => [accessor, name]));
  const lines = text.replaceAll(importLine, "").split("\n");
  const lastImport = lines.findLastIndex((line) => line.trimStart().startsWith("(import "));
  lines.splice(lastImport + 1, 0, memoryImports(segments));
  const end = lines.findLastIndex((line) => line.trim() === ")");
  lines.splice(
    end,
    0,
    accessorFunctions(segments, (accessor) => names.get(accessor) ?? `guest.unused.${accessor}`),
  );

  const module = binaryen.parseText(lines.join("\n"));
  module.setFeatures(featuresOf(binaryen));
  binaryen.setOptimizeLevel(3);
  binaryen.setShrinkLevel(0);
  binaryen.setAlwaysInlineMaxSize(40);
  binaryen.setFlexibleInlineMaxSize(800);
  module.optimize();
  if (!module.validate()) throw new Error(`core with ${segments} segments an end does not validate`);
  const binary = module.emitBinary();
  module.dispose();
  return binary;
}
