// zarrita under Node: lists a store from its consolidated metadata and reads what it is told, one JSON object to stdout.
import { readFileSync } from "node:fs";
import FileSystemStore from "@zarrita/storage/fs";
import * as zarr from "zarrita";

const { stores, arrays } = JSON.parse(readFileSync(process.argv[2], "utf8"));
const result = {};
for (const [store, path] of Object.entries(stores)) {
  const files = new FileSystemStore(path);
  const listed = await zarr.withConsolidatedMetadata(files, { format: "v3" });
  const root = await zarr.open.v3(zarr.root(listed), { kind: "group" });
  const read = {};
  for (const name of arrays[store]) {
    const array = await zarr.open.v3(root.resolve(name), { kind: "array" });
    const { data, shape } = await zarr.get(array);
    read[name] = { shape, dimensions: array.dimensionNames, data: Array.from(data, Number) };
  }
  result[store] = { version: root.attrs.featstore.format_version, contents: listed.contents(), read };
}
process.stdout.write(JSON.stringify(result, (_, value) => (Number.isNaN(value) ? "NaN" : value)));
