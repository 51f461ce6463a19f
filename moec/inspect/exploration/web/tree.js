// The ops of a graph as boxes in boxes: modules, runs of modules that are alike, and ops.
import {R,T,graphAt,word,op,outputs,D,ATTRS,NAME,MODULE,INPUTS} from './ops.js';

const FEW=3,MOST=60; // alike modules in a row become one box; more boxes in one are cut in parts
const nameOf=box=>box.kind==='op'?box.module:box.label,numberOf=box=>/^\d+(?=\.|$)/.exec(nameOf(box))?.[0];

// {kind, key, path, label, children, ops}: kind is 'op', 'group', 'stack' (alike) or 'part' (a cut).
export function treeOf(f,step,status=new Map()){
  const ids=graphAt(f,step),root=group('','','');
  const leaves=ids.map((id,at)=>{
    let box=root;
    const path=word(id,MODULE).split(' ')[0];
    for(const segment of path?path.split('.'):[]){
      const key=box.path?`${box.path}.${segment}`:segment;
      if(!box.named.has(segment)){
        const child=group(key,key,segment);
        box.named.set(segment,child);
        box.children.push(child);
      }
      box=box.named.get(segment);
    }
    const leaf={kind:'op',key:`op:${id}`,path,label:shortName(word(id,NAME)),module:'',children:[],id,at,
      experts:expertsOf(id),changed:status.has(id)?1:0};
    box.children.push(leaf);
    return leaf;
  });
  simplify(root);
  for(let main;(main=root.children.find(c=>c.kind==='group'&&!c.block&&c.size>0.7*ids.length));)dissolve(root,main);
  root.children.forEach(stackAlike);
  stackAlike(root);
  setParents(root);
  connect(f,root,ids,leaves);
  return{root,leaves};
}
const group=(path,key,label)=>({kind:'group',key,path,label,children:[],named:new Map(),size:0,changed:0,
  block:R.blocks.find(b=>b.name===path&&path)});
export const shortName=name=>name.replace(/^aten\./,'').replace(/\.(default|Tensor|Scalar|int|dim|dim_IntList)$/,'').replace(/^_to_copy$/,'cast');
// The number of experts of an op that computes with those of a block.
function expertsOf(id){
  if(!/^(grouped\.|moe\.(linear|experts|mlp|ffn))/.test(word(id,NAME)))return 0;
  const module=`${word(id,MODULE).split(' ')[0]}.`;
  const block=R.blocks.find(b=>module.startsWith(`${b.name}.`)||b.name==='(whole model)');
  const counted=/num_experts=(\d+)/.exec(word(id,ATTRS));
  return block?block.experts:counted?+counted[1]:0;
}
// A group of one child is that child, and the members of a numbered list are children of its parent.
function simplify(box){
  if(box.kind==='op')return box.size=1;
  box.children.forEach(simplify);
  box.children=box.children.map(child=>{
    if(child.kind!=='group'||child.children.length!==1||child.block)return child;
    const [only]=child.children;
    if(only.kind==='op')only.module=only.module?`${child.label}.${only.module}`:child.label;
    else only.label=`${child.label}.${only.label}`;
    return only;
  });
  for(const child of[...box.children])
    if(child.kind==='group'&&child.children.filter(numberOf).length>1)dissolve(box,child);
  box.size=box.children.reduce((n,c)=>n+c.size,0);
  box.changed=box.children.reduce((n,c)=>n+c.changed,0);
}
function dissolve(parent,child){
  for(const c of child.children){
    const number=numberOf(c);
    if(number===undefined)continue;
    Object.assign(c,{list:child.path,number,[c.kind==='op'?'module':'label']:`${child.label}.${nameOf(c)}`});
  }
  parent.children.splice(parent.children.indexOf(child),1,...child.children);
}
const signature=box=>box.kind==='op'?`${word(box.id,NAME)}/${box.list===undefined?box.module:''}/${box.changed}`:
  `${box.list===undefined?box.label:''}(${box.children.map(signature).join()})`;
function stackAlike(box){
  if(box.kind==='op')return;
  if(box.path)box.children.forEach(stackAlike);
  const children=[];
  for(let at=0;at<box.children.length;){
    const first=box.children[at];
    let end=at+1;
    if(first.list!==undefined){
      const form=signature(first);
      while(end<box.children.length&&box.children[end].list===first.list&&signature(box.children[end])===form)end++;
    }
    const run=box.children.slice(at,end);
    at=end;
    if(run.length<FEW){children.push(...run);continue}
    const label=`${nameOf(first)} – ${run.at(-1).number}`;
    children.push(sum({kind:'stack',key:`stack:${first.key}`,path:first.list,label,children:run}));
  }
  box.children=children;
  if(children.length<=MOST)return;
  const count=Math.ceil(children.length/MOST),size=Math.ceil(children.length/Math.max(count,2));
  box.children=[];
  for(let at=0;at<children.length;at+=size){
    const part=children.slice(at,at+size);
    box.children.push(sum({kind:'part',key:`part:${box.key}:${at}`,path:'',label:`part ${box.children.length+1}`,children:part}));
  }
  if(box.children.length>MOST)stackAlike(box);
}
function sum(box){
  box.size=box.children.reduce((n,c)=>n+c.size,0);
  box.changed=box.children.reduce((n,c)=>n+c.changed,0);
  return box;
}
function setParents(box,depth=0){
  Object.assign(box,{depth,edges:new Map(),reads:new Map()});
  for(const child of box.children){child.parent=box;setParents(child,depth+1)}
}
// Edges between the children of each box; `IN` and `OUT` are its border.
export const IN='in',OUT='out';
function connect(f,root,ids,leaves){
  const makers=new Map(),inputs=new Map();
  for(const[name,type]of D.functions[f].inputs)inputs.set(name,{kind:'port',key:`input:${name}`,label:name,type,side:IN});
  ids.forEach((id,at)=>outputs(id).forEach(([v])=>makers.set(v,leaves[at])));
  const ports=new Map();
  ids.forEach((id,at)=>{
    for(const v of new Set(op(id)[INPUTS])){
      const maker=makers.get(v),port=inputs.get(T[v]);
      if(maker&&maker!==leaves[at])join(maker,leaves[at],v);
      else if(port){ports.set(port.key,port);enter(root,port.key,leaves[at],v)}
      else if(!maker)(leaves[at].weights??=[]).push(T[v]);
    }
  });
  for(const[name,type]of D.functions[f].outputs){
    const v=T.indexOf(name),maker=makers.get(v);
    if(!maker)continue;
    const port={kind:'port',key:`output:${name}`,label:name,type,side:OUT};
    ports.set(port.key,port);
    leave(root,maker,port.key,v);
  }
  for(const port of ports.values()){
    Object.assign(port,{parent:root,children:[],depth:1,size:0,changed:0,reads:new Map()});
    port.side===IN?root.children.unshift(port):root.children.push(port);
  }
  [root,...inner(root)].forEach(markHubs);
}
const inner=box=>box.children.flatMap(c=>c.kind==='op'||c.kind==='port'?[]:[c,...inner(c)]);
function edge(box,from,to,v){
  const key=`${from}\n${to}`;
  if(!box.edges.has(key))box.edges.set(key,{from,to,values:new Set(),hidden:false});
  box.edges.get(key).values.add(v);
}
// From the border of a box down to a leaf, and from a leaf up to it.
function enter(box,from,leaf,v){
  let child=leaf;
  for(;child.parent!==box;child=child.parent)edge(child.parent,IN,child.key,v);
  edge(box,from,child.key,v);
}
function leave(box,leaf,to,v){
  let child=leaf;
  for(;child.parent!==box;child=child.parent)edge(child.parent,child.key,OUT,v);
  edge(box,child.key,to,v);
}
function join(maker,reader,v){
  let a=maker,b=reader;
  while(a.parent!==b.parent){
    const deeper=a.depth-b.depth;
    if(deeper>=0)a=a.parent;
    if(deeper<=0)b=b.parent;
  }
  const box=a.parent;
  for(let child=maker;child!==a;child=child.parent)edge(child.parent,child.key,OUT,v);
  for(let child=reader;child!==b;child=child.parent)edge(child.parent,IN,child.key,v);
  edge(box,a.key,b.key,v);
}
// What many boxes in a row read (the angles of all layers) is named in them, for arrows would cover the rest.
function markHubs(box){
  const byMaker=new Map();
  for(const e of box.edges.values()){
    if(!byMaker.has(e.from))byMaker.set(e.from,[]);
    byMaker.get(e.from).push(e);
  }
  for(const[from,edges]of byMaker){
    const readers=new Set(edges.map(e=>e.to)),named=box.children.find(c=>c.key===from);
    const chained=[...readers].filter(r=>(byMaker.get(r)??[]).some(e=>readers.has(e.to))).length;
    if(readers.size<5||chained<3)continue;
    for(const e of edges.slice(1)){
      e.hidden=true;
      box.children.find(c=>c.key===e.to)?.reads.set(from,named?named.module||named.label:'input');
    }
  }
}
export function ancestors(box){
  const list=[];
  for(let b=box.parent;b&&b.parent;b=b.parent)list.push(b);
  return list;
}
