// Compile formats/kvtc.ksy and read golden streams with it; prints one JSON object.
//   npm install --prefix DIR kaitai-struct-compiler kaitai-struct js-yaml
//   NODE_PATH=DIR/node_modules node tests/kaitai/check.js FILE...
const fs = require("fs");
const path = require("path");
const yaml = require("js-yaml");
const compiler = require("kaitai-struct-compiler");
const KaitaiStream = require("kaitai-struct/KaitaiStream");

const schema = path.join(__dirname, "..", "..", "formats", "kvtc.ksy");

async function main() {
  const files = await compiler.compile("javascript", yaml.load(fs.readFileSync(schema, "utf8")), null, false);
  const found = {};
  const code = files["Kvtc.js"];
  const exported = {};
  new Function("exports", "module", "require", "define", code)(
    exported, { exports: exported },
    (name) => (name.endsWith("KaitaiStream") ? KaitaiStream : require(name)), undefined);
  const Kvtc = exported.Kvtc || exported;
  for (const file of process.argv.slice(2)) {
    const stream = new Kvtc(new KaitaiStream(fs.readFileSync(file)));
    found[path.basename(file)] = stream.items.map((item) => ({
      type: item.record.type,
      sequence: item.record.sequence,
      length: item.record.payloadLength + 40,
      tokens: item.record.type === 1
        ? item.record.payload.tokens - item.record.payload.cutFront - item.record.payload.cutEnd : 0,
      entries: item.record.type === 2 ? item.record.payload.count : 0,
      total: item.trailer ? item.trailer.totalLength : 0,
    }));
  }
  console.log(JSON.stringify(found));
}

main().catch((error) => { console.error(error); process.exit(1); });
