// Draws a picture with an export of minidiff (`minidiff export MODEL DIR --to aoti`), without Python.
//
//     draw DIR PLAN.json IDS.txt OUT.ppm [SEED] [GUIDANCE] [WIDTHxHEIGHT] [LATENTS.bin]
//
// IDS.txt holds the token ids of the negative prompt and of the prompt, equally many. PLAN.json is one of DIR/plans. The
// picture is written as PPM, and the latents as raw float32. For models with one text encoder; build.py compiles it.

#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <cctype>
#include <cstdio>
#include <fstream>
#include <iostream>
#include <map>

struct Json {  // as far as manifests and plans need it
  double number = 0;
  std::string text;
  std::vector<Json> list;
  std::map<std::string, Json> members;

  const Json& operator[](const std::string& name) const {
    auto found = members.find(name);
    if (found == members.end()) throw std::runtime_error("there is no \"" + name + "\" in the JSON");
    return found->second;
  }
};

struct Reader {
  std::string s;
  size_t at = 0;

  char next() {
    while (at < s.size() && std::isspace(static_cast<unsigned char>(s[at]))) at++;
    if (at >= s.size()) throw std::runtime_error("the JSON ends too early");
    return s[at];
  }
  std::string string() {
    std::string found;
    for (at++; at < s.size() && s[at] != '"'; at++) {
      if (s[at] == '\\') at++;
      found += s[at];
    }
    at++;
    return found;
  }
  Json value() {
    Json v;
    char c = next();
    size_t from = at, used = 0;
    if (c == '"') v.text = string();
    else if (c == '{' || c == '[') {
      char close = c == '{' ? '}' : ']';
      for (at++; next() != close;) {
        if (s[at] == ',') at++;
        if (c == '[') { v.list.push_back(value()); continue; }
        next();
        std::string name = string();
        if (next() != ':') throw std::runtime_error("a ':' is missing in the JSON");
        at++;
        v.members[name] = value();
      }
      at++;
    } else if (std::isdigit(static_cast<unsigned char>(c)) || c == '-') {
      v.number = std::stod(s.substr(at, 40), &used);
      at += used;
    } else {
      while (at < s.size() && std::isalpha(static_cast<unsigned char>(s[at]))) at++;
      v.text = s.substr(from, at - from);  // true, false, null
      v.number = v.text == "true";
      if (at == from) throw std::runtime_error("the JSON is damaged");
    }
    return v;
  }
};

Json read(const std::string& path) {
  std::ifstream file(path);
  if (!file) throw std::runtime_error(path + ": can't be opened");
  return Reader{{std::istreambuf_iterator<char>(file), {}}}.value();
}

using Loader = torch::inductor::AOTIModelPackageLoader;
using Values = std::map<std::string, at::Tensor>;

at::Tensor total(const Json& weights, const Values& values) {
  at::Tensor sum = at::zeros_like(values.at("x"));
  for (auto& [name, weight] : weights.members) sum = sum + weight.number * values.at(name);
  return sum;
}

void draw(const std::vector<std::string>& given) {
  std::string folder = given[0] + "/";
  Json manifest = read(folder + "manifest.json"), plan = read(given[1]), programs = manifest["programs"];
  if (manifest["to"].text != "aoti") throw std::runtime_error(folder + ": export the model with --to aoti");
  auto open = [&](const char* name) { return Loader(folder + programs[name]["file"].text); };
  if (programs.members.count("text_encoder_2") || !programs.members.count("text_encoder"))
    throw std::runtime_error("this program draws with models of one text encoder");
  auto text = open("text_encoder"), unet = open("unet"), decoder = open("vae_decoder");

  std::ifstream file(given[2]);
  std::vector<int64_t> ids{std::istream_iterator<int64_t>(file), {}};
  if (ids.empty() || ids.size() % 2) throw std::runtime_error(given[2] + ": ids of two prompts are wanted");
  auto context = text.run({at::tensor(ids, at::kLong).reshape({2, -1})})[0];

  int64_t seed = given.size() > 4 ? std::stoll(given[4]) : 0, width = 0, height = 0;
  double guidance = given.size() > 5 ? std::stod(given[5]) : 7.5;
  if (std::sscanf(given.size() > 6 ? given[6].c_str() : "512x512", "%ldx%ld", &width, &height) != 2)
    throw std::runtime_error(given[6] + ": a size such as 512x512 is wanted");
  auto factor = static_cast<int64_t>(manifest["factor"].number);
  auto channels = static_cast<int64_t>(programs["vae_decoder"]["inputs"]["latents"]["axes"].list[1].number);
  std::vector<int64_t> shape{1, channels, height / factor, width / factor};
  auto generator = at::detail::createCPUGenerator(seed);
  auto noise = [&] { return at::randn(shape, generator, at::kFloat).to(at::kDouble); };

  Values values{{"x", noise() * plan["first"].number}};
  for (auto& row : plan["rows"].list) {
    auto seen = (values["x"] * row["scale"].number).to(at::kFloat);
    auto both = unet.run({at::cat({seen, seen}), at::full({2}, row["timestep"].number), context})[0].chunk(2);
    values["out"] = (both[0] + guidance * (both[1] - both[0])).to(at::kDouble);
    values["noise"] = row["draws"].number ? noise() : at::zeros_like(values["x"]);
    Values after{{"x", total(row["x"], values)}};
    for (auto& [name, weights] : row["remember"].members) after[name] = total(weights, values);
    values = after;
    std::cerr << "." << std::flush;
  }
  auto latents = values["x"].to(at::kFloat).contiguous();
  auto pixels = decoder.run({latents / manifest["scaling_factor"].number})[0];
  auto bytes = ((pixels / 2 + 0.5).clamp(0, 1) * 255).round().to(at::kByte).squeeze(0).permute({1, 2, 0}).contiguous();

  std::ofstream out(given[3], std::ios::binary);
  out << "P6\n" << bytes.size(1) << " " << bytes.size(0) << "\n255\n";
  out.write(static_cast<const char*>(bytes.data_ptr()), bytes.numel());
  if (given.size() > 7)
    std::ofstream(given[7], std::ios::binary).write(static_cast<const char*>(latents.data_ptr()), latents.nbytes());
  if (!out.flush()) throw std::runtime_error(given[3] + ": can't be written");
}

int main(int count, char** words) {
  std::vector<std::string> given(words + 1, words + count);
  if (given.size() < 4)
    return std::cerr << "usage: draw DIR PLAN.json IDS.txt OUT.ppm [SEED] [GUIDANCE] [WxH] [LATENTS.bin]\n", 2;
  try {
    draw(given);
  } catch (const std::exception& e) {
    return std::cerr << "draw: " << std::string(e.what()).substr(0, std::string(e.what()).find('\n')) << "\n", 1;
  }
}
