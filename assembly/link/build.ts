/**
 * Builds the core: compiles assembly/, links it with the guest accessors, optimises the whole.
 *
 *   build/core/core-<n>.wasm    n segments an end: guests of up to n * 16 GiB
 *   build/core/core-hooked.wasm accessors left as imports: tests see every guest access
 *
 * Run by `npm run core`. asc cannot express more than one memory, hence the step through text.
 */
import { readFileSync, writeFileSync } from "node:fs";
import asc from "assemblyscript/asc";
import binaryen from "binaryen";
import { accessorFunctions, memoryImports } from "./accessors.ts";

/** Segments per end of the variants we build. */
const VARIANTS = [1, 2, 5];

const FEATURES =
  binaryen.Features.Atomics |
  binaryen.Features.BulkMemory |
  binaryen.Features.BulkMemoryOpt |
  binaryen.Features.MultiMemory |
  binaryen.Features.Memory64 |
  binaryen.Features.MutableGlobals |
  binaryen.Features.SIMD128 |
  binaryen.Features.SignExt |
  binaryen.Features.NontrappingFPToInt;

const directory = "build/core";

const { error, stderr } = await asc.main(["--config", "asconfig.json", "--target", "release"]);
if (error) throw new Error(`asc: ${error.message}\n${stderr.toString()}`);
const compiled = readFileSync(`${directory}/unlinked.wasm`);
writeFileSync(`${directory}/core-hooked.wasm`, compiled);

const unlinked = binaryen.readBinaryWithFeatures(compiled, FEATURES);
const text = unlinked.emitText();
unlinked.dispose();
for (const segments of VARIANTS) writeFileSync(`${directory}/core-${segments}.wasm`, link(text, segments));

/** Replaces the accessor imports by code over `segments` memories an end. */
function link(text: string, segments: number): Uint8Array {
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
  module.setFeatures(FEATURES);
  binaryen.setOptimizeLevel(3);
  binaryen.setShrinkLevel(0);
  binaryen.setAlwaysInlineMaxSize(40);
  binaryen.setFlexibleInlineMaxSize(120);
  module.optimize();
  if (!module.validate()) throw new Error(`core with ${segments} segments an end does not validate`);
  const binary = module.emitBinary();
  module.dispose();
  return binary;
}
